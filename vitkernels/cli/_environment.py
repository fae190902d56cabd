"""What a result depends on and a reader would ask about: versions, processor, GPUs, driver, commit."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .._version import __version__


def versions() -> dict[str, str | None]:
    """Version of each package that matters, None for one that is not installed."""
    return {
        "vitkernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": _installed("timm"),
        "triton": _installed("triton") or _installed("pytorch-triton"),
        "numpy": _installed("numpy"),
    }


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def gpus() -> list[dict[str, Any]]:
    """Name, architecture, memory in bytes and driver version of each GPU that PyTorch can use."""
    if not torch.cuda.is_available():
        return []
    driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "sm": f"sm_{properties.major}{properties.minor}",
                "memory_bytes": properties.total_memory,
                "driver": driver.splitlines()[0] if driver else None,
            }
        )
    return found


def commit() -> str | None:
    """The git commit of the running checkout, with ``-dirty`` after changes; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    return _output_of("git", "-C", str(root), "describe", "--match=", "--always", "--dirty", "--abbrev=12")


def environment() -> dict[str, Any]:
    """Everything above in one dictionary, with PyTorch's thread count and the SDPA backends that are switched on."""
    sdp = torch.backends.cuda
    return {
        **versions(),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus(),
        "sdpa": {
            "flash": sdp.flash_sdp_enabled(),
            "mem_efficient": sdp.mem_efficient_sdp_enabled(),
            "cudnn": sdp.cudnn_sdp_enabled(),
            "math": sdp.math_sdp_enabled(),
        },
        "commit": commit(),
    }


def _output_of(program: str, *arguments: str) -> str | None:
    path = shutil.which(program)
    if path is None:
        return None
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
