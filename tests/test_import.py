"""Importing vitkernels costs next to nothing and touches neither timm nor Triton nor a GPU.

One process imports torch, and every test gets a fork of it that has imported nothing else.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import seconds_to_import_torch

NURSERY = """
import json, os, sys, traceback
import torch
folder, cases = json.load(sys.stdin)
sys.pycache_prefix, sys.dont_write_bytecode = folder, False  # bytecode as an installation has it, from the second fork on
for name, code, environment in cases:
    if os.fork():
        status = os.waitstatus_to_exitcode(os.wait()[1])
        print(json.dumps([name, status, *(open(f"{folder}/{stream}").read() for stream in ("out", "err"))]), flush=True)
        continue
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{stream}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    os.environ.update(environment)
    status = 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as exit:
        status = exit.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)
"""
PROBE = """
import json, sys, time, torch
before, start = set(sys.modules), time.process_time()
import vitkernels
seconds = time.process_time() - start
heavy = [m for m in ("timm", "triton", "rich", "matplotlib", "sklearn", "numpy") if m in set(sys.modules) - before]
print(json.dumps({"seconds": seconds, "heavy": heavy, "cuda": torch.cuda.is_initialized()}))
"""
PUBLIC = "import vitkernels as v; v.models; print([getattr(v, n) is not None for n in v.__all__], v.VisionTransformer)"
SUBMODULE = "from vitkernels.fuse import FusionReport; import vitkernels; assert callable(vitkernels.fuse)"
BACKEND = "import vitkernels; print(vitkernels._select.policy())"
CALL = "import torch, vitkernels; vitkernels.ops.layer_norm(torch.ones(2, 8))"
COMMAND = "import sys; from vitkernels.cli import main; sys.exit(main(['info']))"
STRIPPED = """
from importlib import metadata
def version(name):
    raise metadata.PackageNotFoundError(name)
metadata.version = metadata.distribution = version
import vitkernels
print(vitkernels._env.ADDMM_COPIES)
"""
PROBES = [f"probe {i}" for i in range(8)]
CASES = [
    *((name, PROBE, {}) for name in PROBES),
    ("public", PUBLIC, {}),
    ("submodule", SUBMODULE, {}),
    *((name, BACKEND, {"VITKERNELS_BACKEND": name}) for name in ("reference", "fused", "auto")),
    ("stripped", STRIPPED, {}),
    ("empty", BACKEND, {"VITKERNELS_BACKEND": ""}),
    ("call", CALL, {"VITKERNELS_BACKEND": "fast"}),
    ("command", COMMAND, {"VITKERNELS_BACKEND": "fast"}),
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Exit code and output of each of ``CASES``."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VITKERNELS_BACKEND")}
    request = json.dumps([str(tmp_path_factory.mktemp("forks")), CASES])
    command = [sys.executable, "-c", NURSERY]
    done = subprocess.run(command, input=request, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return {name: SimpleNamespace(returncode=code, stdout=out, stderr=err) for name, code, out, err in lines}


def test_importing_is_light(ran):
    probes = [json.loads(ran[name].stdout) for name in PROBES]
    assert probes[0]["heavy"] == []
    assert not probes[0]["cuda"]
    # The least of several, without cold caches.
    assert min(p["seconds"] for p in probes) < 0.04 * seconds_to_import_torch()


def test_public_names_resolve_lazily(ran):
    assert ran["public"].returncode == 0, ran["public"].stderr
    assert "True" in ran["public"].stdout
    assert "False" not in ran["public"].stdout


def test_importing_a_submodule_first_does_not_hide_the_function_of_that_name(ran):
    assert ran["submodule"].returncode == 0, ran["submodule"].stderr


def test_importing_needs_no_metadata_of_pytorchs_distribution(ran):
    """Frozen and stripped installations have none."""
    assert ran["stripped"].returncode == 0, ran["stripped"].stderr
    assert ran["stripped"].stdout.strip() == str(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15))


@pytest.mark.parametrize("name", ["reference", "fused", "auto"])
def test_the_environment_sets_the_default_backend(ran, name):
    assert ran[name].stdout.strip() == name


def test_an_empty_variable_is_none(ran):
    """``docker run -e VITKERNELS_BACKEND=`` and the like."""
    assert ran["empty"].stdout.strip() == "auto"


def test_an_unknown_backend_in_the_environment_is_named(ran):
    assert ran["call"].returncode != 0
    assert "ValueError: VITKERNELS_BACKEND is 'fast'; accepted: auto, fused, reference" in ran["call"].stderr


def test_the_command_names_an_unknown_backend_in_one_line(ran):
    assert ran["command"].returncode == 2
    assert ran["command"].stderr == "vitkernels: error: VITKERNELS_BACKEND is 'fast'; accepted: auto, fused, reference\n"
    assert ran["command"].stdout == ""
