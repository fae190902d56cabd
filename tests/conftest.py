"""The suite's process: the interpreter is on and made faithful before anything imports Triton, and numpy runs one thread."""

import contextlib
import gc
import os

# The interpreter works on many small numpy arrays; threads only cost. Must be set before numpy and torch load.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import torch

# On a GPU the same tests run the compiled kernels; without one, the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import interpreter
import pytest
from helpers import poisoned

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.install()
else:
    # cuDNN's convolutions are TF32 unless one says otherwise, and patch_embed follows their switch: float32 tests mean float32.
    torch.backends.cudnn.allow_tf32 = False


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """``pytest`` alone, without files and without ``-n``, runs the suite on up to four cores.

    In ``addopts``, ``-n`` would also reach ``pytest benchmarks/ --benchmark-only``, which cannot be distributed.
    """
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    if everything and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses = min(4, os.cpu_count() or 1)


def pytest_collection_finish():
    """What is imported by now stays to the end: the garbage collector, which comes often here, need not look through it."""
    gc.freeze()


# Each compiles or runs first what all of its tests look at.
MADE_ONCE = (
    "test_benchmarks.py",
    "test_import.py",
    "test_inspect.py",
    "test_linear_aot.py",
    "test_pos_embed_source.py",
    "test_stub_driver.py",
)


@pytest.hookimpl(optionalhook=True)  # without xdist there is no such hook
def pytest_xdist_make_scheduler(config, log):
    """Tests of the files above stay in one process. (``--dist loadgroup`` does nothing under pytest 9.2.)"""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, _ = nodeid.partition("::")
            return file if file.endswith(MADE_ONCE) else nodeid

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _poison_seed_and_backend(request, monkeypatch):
    """Every test starts from one seed, and memory from ``torch.empty`` is NaN: what a kernel forgets to write shows.

    Tests marked gpu make their tensors on the GPU. On a CPU ``auto`` leaves a fused block to timm's forward; here the fused
    forward runs, on what the operators choose.
    """
    torch.manual_seed(0)
    monkeypatch.setattr("vitkernels.ops._availability.leaves_to_pytorch", lambda x: False)
    on_gpu = torch.cuda.is_available() and request.node.get_closest_marker("gpu") is not None
    with poisoned(), torch.device("cuda") if on_gpu else contextlib.nullcontext():
        yield


@pytest.fixture
def fresh_dynamo():
    """No graph of another test, and none is left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_interpreter(monkeypatch):
    """The process of a user without a GPU: operators on a CPU run their reference."""
    monkeypatch.setattr("vitkernels._env.INTERPRETING", False)
