"""Every operator and fused models go through Triton's own launcher, with a driver that does nothing (``tests/stub_driver``)."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import stub_driver
import torch

from vitkernels.ops import _register

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU, and there is one"),
    pytest.mark.skipif(stub_driver.compiler() is None and "CI" not in os.environ, reason="needs a C compiler"),
]


def python(*arguments, without=(), **variables):
    """Of a process of its own, which does not interpret."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VITKERNELS_BACKEND", *without)} | variables
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def lines():
    return [json.loads(line) for line in python(str(HERE / "stub_driver" / "launches.py")).splitlines()]


def launches(lines, room):
    """By case; every case has run, and what reached the driver is what the recorder of launches counts."""
    found = [line for line in lines if line["room"] == room]
    assert not [line for line in found if "error" in line]
    assert not [line for line in found if line["launches"] != line["recorded"]]
    return {line["case"]: line["launches"] for line in found}


def test_every_registered_operator_is_launched(lines):
    counts = defaultdict(int)
    for case, count in launches(lines, "operators").items():
        counts[case.partition(" ")[0]] += count
    assert set(counts) == set(_register.NAMES)
    not_of_triton = {name for name in counts if name.startswith("resample_pos_embed")}
    assert {name for name, count in counts.items() if count == 0} == not_of_triton


def test_every_public_function_is_launched_forward_and_backward(lines):
    found = launches(lines, "functions")
    assert found["layer_norm"] == 3  # forward; backward, and the sum of its partial gradients
    assert found["attention_qkv of many heads"] == 2  # forward; backward in one program a head
    assert found["attention_qkv"] == 3  # few heads: backward in two launches
    assert found["linear, triton"] == 3  # one GEMM; the activation's backward, and the sum of the bias's gradient
    assert {case.partition(",")[0].split()[0] for case in found} >= {"add_layer_norm", "attention", "mlp", "patch_embed"}


def test_fused_models_are_launched(lines):
    found = launches(lines, "models")
    kinds = {case.partition(",")[0] for case in found}
    assert kinds == {"plain", "LayerScale", "inference", "uint8", "attention pooling", "NaFlex"}
    for plan in ("cublas", "triton"):
        assert found[f"inference, {plan}"] > 0
        for kind in kinds - {"inference"}:
            assert found[f"{kind}, {plan}, training"] > 2 * found[f"{kind}, {plan}"] > 0


BROKEN = """
import stub_driver
stub = stub_driver.install()
import torch
from vitkernels import ops, backend
from vitkernels.kernels import layer_norm

kernel, x = layer_norm._layer_norm_fwd_kernel, torch.randn(4, 64)
with backend("fused"):
    ops.layer_norm(x)
assert stub.launches() == 1

class Broken:
    def __getitem__(self, grid):
        return lambda *args, **options: kernel[grid]({arguments}, **options)

layer_norm._layer_norm_fwd_kernel = Broken()
try:
    with backend("fused"):
        ops.layer_norm(x)
except Exception as error:
    print(type(error).__name__, error)
assert stub.launches() == 1
"""


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [("*args[:-1]", "missing 1 required"), ("args[0].numpy(), *args[1:]", "failed to specialize")],
    ids=["an argument is missing", "an array where a tensor belongs"],
)
def test_what_binding_refuses_raises_and_is_not_launched(arguments, refusal):
    assert re.search(refusal, python("-c", BROKEN.format(arguments=arguments)))


def test_it_refuses_a_process_that_has_triton_already():
    script = "import triton, stub_driver\ntry: stub_driver.install()\nexcept RuntimeError as error: print(error)"
    assert "has not imported Triton yet" in python("-c", script)


def test_a_user_without_a_home_can_install_it(tmp_path):
    (tmp_path / "file").touch()  # no folder can be made in it, not even by root
    script = "import stub_driver; stub_driver.install(); print('installed')"
    done = python("-c", script, without=("TRITON_CACHE_DIR", "TRITON_HOME"), HOME=str(tmp_path / "file"))
    assert done == "installed\n"
