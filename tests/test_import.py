"""Importing vitkernels costs next to nothing and touches neither timm nor Triton nor a GPU."""

import json
import os
import subprocess
import sys

import pytest

PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import vitkernels
seconds = time.perf_counter() - start
heavy = [m for m in ("timm", "triton", "rich", "matplotlib", "sklearn", "numpy") if m in set(sys.modules) - before]
print(json.dumps({"seconds": seconds, "heavy": heavy, "cuda": torch.cuda.is_initialized()}))
"""


def in_a_fresh_process(code, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_importing_is_light():
    probes = [json.loads(in_a_fresh_process(PROBE).stdout) for _ in range(3)]
    assert probes[0]["heavy"] == []
    assert not probes[0]["cuda"]
    # 50 ms is the promise; the margin is for a busy machine, and the best of three for its disk cache.
    assert min(p["seconds"] for p in probes) < 0.15


def test_public_names_resolve_lazily():
    code = "import vitkernels as v; v.models; print([getattr(v, n) is not None for n in v.__all__], v.VisionTransformer)"
    result = in_a_fresh_process(code)
    assert result.returncode == 0, result.stderr
    assert "False" not in result.stdout


def test_importing_a_submodule_first_does_not_hide_the_function_of_that_name():
    code = "from vitkernels.fuse import FusionReport; import vitkernels; assert callable(vitkernels.fuse)"
    assert in_a_fresh_process(code).returncode == 0


@pytest.mark.parametrize("name", ["reference", "fused", "auto"])
def test_the_environment_sets_the_default_backend(name):
    code = "import vitkernels; print(vitkernels._select._backend)"
    assert in_a_fresh_process(code, VITKERNELS_BACKEND=name).stdout.strip() == name


def test_an_unknown_backend_in_the_environment_is_named():
    result = in_a_fresh_process(
        "import torch, vitkernels; vitkernels.ops.layer_norm(torch.ones(2, 8))", VITKERNELS_BACKEND="fast"
    )
    assert result.returncode != 0
    assert "ValueError: VITKERNELS_BACKEND is 'fast'; accepted: auto, fused, reference" in result.stderr


def test_the_command_names_an_unknown_backend_in_one_line():
    result = in_a_fresh_process(
        "import sys; from vitkernels.cli import main; sys.exit(main(['info']))", VITKERNELS_BACKEND="fast"
    )
    assert result.returncode == 2
    assert result.stderr == "vitkernels: error: VITKERNELS_BACKEND is 'fast'; accepted: auto, fused, reference\n"
    assert result.stdout == ""
