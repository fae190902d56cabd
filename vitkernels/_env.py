"""The one place for environment variables and for asking what is installed.

``VITKERNELS_BACKEND``  ``auto`` (default), ``fused`` or ``reference``: the policy outside any ``vitkernels.backend(...)``.
``TRITON_INTERPRET``    Triton's own switch: ``1`` before Triton is imported runs the kernels in its CPU interpreter.
``VITKERNELS_CACHE``    folder of what ``vitkernels tune`` measured; else ``vitkernels`` in the user's cache folder.
``TRITON_CACHE_DIR``    Triton's own: its folder of compiled kernels. Set here where Triton's default cannot be written.
``VITKERNELS_BUILD_CUDA`` is read by ``setup.py`` alone.
"""

import atexit
import functools
import importlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("auto", "fused", "reference")

# Plain module constants, not cached functions: Dynamo guards on these and traces through.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


# CUDA's addmm(matrix, a, b) copied the matrix into the result first, 2 units of a residual stream, until it could give both to
# cuBLASLt (https://github.com/pytorch/pytorch/pull/191706). By the symbols of libtorch_cuda 2.11 copies and 2.15 does not.
ADDMM_COPIES = _version(torch.__version__) < (2, 15)


def default_backend() -> str:
    """The policy named by ``VITKERNELS_BACKEND``, unchecked: if importing failed, the command could not say why."""
    return os.environ.get("VITKERNELS_BACKEND") or "auto"  # set and empty, as containers do, is not set


def check_backend(name: str) -> None:
    """Raise ``ValueError`` for an unknown name, which only the environment can have given."""
    if name not in BACKENDS:
        raise ValueError(f"VITKERNELS_BACKEND is {name!r}; accepted: {', '.join(BACKENDS)}")


def tuned_dir() -> Path | None:
    """Where the user's tuned tables are; need not exist. None for a user without a home folder, as in some containers."""
    cache = os.environ.get("VITKERNELS_CACHE")
    if cache:
        return Path(cache) / "tuned"
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # HOME is not set, and the system does not know the user
        return None
    return Path(caches) / "vitkernels" / "tuned"


def give_triton_a_cache() -> None:
    """Where Triton cannot make its folder of compiled kernels, in some containers, name it a temporary one of this process.

    A launch would fail there: Triton takes ``~`` for a folder's name where the user has no home. A folder that the user named
    is left to Triton. What lies in a folder that can be read only, as one that came with a container, is found from the
    temporary one.
    """
    if os.environ.get("TRITON_CACHE_DIR") or os.environ.get("TRITON_HOME"):
        return
    home = os.path.expanduser("~")
    cache = Path(home, ".triton", "cache")
    found = next((folder for folder in (cache, *cache.parents) if os.path.lexists(folder)), cache)  # a link that leads nowhere
    if home != "~" and found.is_dir() and os.access(found, os.W_OK):
        return
    try:
        temporary = tempfile.mkdtemp(prefix="vitkernels-triton-")
        for entry in os.listdir(cache) if os.access(cache, os.R_OK | os.X_OK) and cache.is_dir() else ():
            os.symlink(cache / entry, Path(temporary, entry))
    except OSError as error:  # nor a temporary folder: whoever launches will hear of it from Triton
        logging.getLogger("vitkernels").info("there is no folder for compiled kernels: %s", error)
        return
    os.environ["TRITON_CACHE_DIR"] = temporary
    atexit.register(_delete, temporary, os.getpid())
    logging.getLogger("vitkernels").info(
        "%s cannot be written: compiled kernels are kept until this process ends; TRITON_CACHE_DIR names another folder", cache
    )


@functools.cache
def triton_cannot_launch() -> str | None:
    """What keeps Triton from launching kernels on this machine's GPU, as in a container without a C compiler; else None.

    Triton compiles C code that launches kernels when it is first asked for its driver, and keeps the result in its cache.
    """
    give_triton_a_cache()
    try:
        from triton.runtime import driver

        driver.active  # noqa: B018  (a property that makes the driver)
    except Exception as error:  # whatever it is, PyTorch's operators run
        reason = (str(error).splitlines() or [""])[0]
        return f"Triton cannot launch here, which takes a C compiler and Python.h: {type(error).__name__}: {reason}"
    return None


def _delete(folder: str, made_by: int) -> None:
    if os.getpid() == made_by:  # not a forked child, which ends before its parent
        shutil.rmtree(folder, ignore_errors=True)


def extension() -> ModuleType | None:
    """The compiled extension ``vitkernels._C``, or ``None`` when the package was installed without a compiler."""
    if importlib.util.find_spec("vitkernels._C") is None:
        return None
    return importlib.import_module("vitkernels._C")


def _load_extension() -> ModuleType | None:
    try:
        return extension()
    except ImportError:  # built for another Python or libc; `vitkernels info` shows the message
        return None


# The extension itself, loaded once: looking for it takes 20 us.
EXTENSION: Any = _load_extension()
# What it was compiled for: sm_* are binaries, compute_* is PTX. Empty when it was built without CUDA.
EXTENSION_ARCHITECTURES: tuple[str, ...] = () if EXTENSION is None else tuple(EXTENSION.build_info()["architectures"])
