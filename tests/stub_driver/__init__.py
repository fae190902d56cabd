"""Triton's real launch path on a machine without a GPU: CUDA's driver is replaced by one that does nothing (``libcuda.c``).

After ``install`` an operator called on CPU tensors goes the way that it goes on an H100: dispatch, launcher, Triton's
compilation for sm_90, its C code that packs the arguments, ``cuLaunchKernelEx``. Kernels do not run, so results are whatever
the memory held. What Triton refuses to bind or to pack raises here as it would there; nothing else is checked (not types, not
alignment). The interpreter and ahead-of-time compilation are for that. Operators enter through PyTorch's dispatch key of the
CPU, so the guard that selects the tensors' GPU around a launch is not part of it.

``install`` changes the process for good: it is called in a process of its own, before anything imports Triton.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("libcuda.c")
ARCH, MULTIPROCESSORS = 90, 132  # the chip whose attributes libcuda.c has


class StubDriver:
    """The driver that was installed."""

    def __init__(self, folder: tempfile.TemporaryDirectory[str], library: ctypes.CDLL) -> None:
        self._folder = folder  # Triton links its launchers against the library until the process ends
        library.stub_launches.restype = ctypes.c_long
        self._launches = library.stub_launches

    def launches(self) -> int:
        """Kernels launched so far in this process."""
        return self._launches()


def compiler() -> str | None:
    """The C compiler, which Triton needs for its launchers too; None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)


@functools.cache
def install() -> StubDriver:
    """Build the driver, load it, and let Triton, torch.cuda and vitkernels believe that there is an H100.

    Raises:
        RuntimeError: there is a GPU, no C compiler, or the process has imported Triton or has ``TRITON_INTERPRET`` set.
    """
    import torch

    if torch.cuda.is_available():  # asked before the library is loaded: PyTorch keeps the answer, and must not ask the stub
        raise RuntimeError("the stub driver stands for a GPU that is not there, and this machine has one")
    if "triton" in sys.modules or os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("the stub driver needs a process without TRITON_INTERPRET that has not imported Triton yet")
    cc = compiler()
    if cc is None:
        raise RuntimeError("the stub driver needs a C compiler")
    folder = tempfile.TemporaryDirectory(prefix="stub-driver-")
    path = Path(folder.name, "libcuda.so.1")
    # The name of the real library: Triton opens that, and what it links here is no different from what it links on a GPU.
    command = [cc, "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", str(SOURCE), "-o", str(path)]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder.name
    stub = StubDriver(folder, ctypes.CDLL(str(path)))
    _replace_torch_cuda()
    _replace_triton_driver()
    _replace_device_queries()
    return stub


def _replace_torch_cuda() -> None:
    """What Triton and our launchers ask PyTorch about the device."""
    import torch

    properties = types.SimpleNamespace(major=ARCH // 10, minor=ARCH % 10, multi_processor_count=MULTIPROCESSORS)
    properties.name = "stub driver"

    def device_count() -> int:
        return 1

    def current_device() -> int:
        return 0

    def lazy_init() -> None:
        pass

    cuda: Any = torch.cuda
    cuda._lazy_init, cuda.device_count, cuda.current_device = lazy_init, device_count, current_device
    # Lambdas stand for functions of C, and host_overhead.py does not count them as calls of Python.
    cuda._get_device_properties = lambda index: properties
    torch._C._cuda_getDevice = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda device: 0


def _replace_triton_driver() -> None:
    from vitkernels import _env

    _env.give_triton_a_cache()  # the driver compiles its C code as soon as it is made

    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    driver.set_active(CudaDriver())


def _replace_device_queries() -> None:
    """CPU tensors stand for the GPU's, and cost what those cost: each question goes to torch.cuda, as on a GPU."""
    import torch

    from vitkernels import _env, _select
    from vitkernels.kernels import _recorder, linear

    _env.INTERPRETING = True  # operators launch for CPU tensors
    _env.EXTENSION_ARCHITECTURES = (f"sm_{ARCH}",)  # resampling is not Triton's: its kernels of the CPU run

    def target(x: torch.Tensor) -> str | None:
        return _select._architecture(0)

    def multiprocessors(device: torch.device) -> int:
        return torch.cuda.get_device_properties(0).multi_processor_count

    def architecture(device: torch.device) -> int:
        major, minor = torch.cuda.get_device_capability(0)
        return 10 * major + minor

    _recorder.modules()  # loads every kernel file
    for name in [name for name in sys.modules if name.startswith("vitkernels.kernels.")]:
        for question in (multiprocessors, architecture):
            if hasattr(sys.modules[name], question.__name__):
                setattr(sys.modules[name], question.__name__, question)

    def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8)

    _select.target, linear._scratch = target, scratch
