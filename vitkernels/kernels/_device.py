"""What launchers ask of the device that they launch on, and the chips that ahead-of-time compilation knows. No Triton here."""

import dataclasses
import functools

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of an architecture (CUDA C++ programming guide, table of compute capabilities), sizes in bytes.

    ``name``: of the GPU that stands for it, as CUDA reports it.
    """

    name: str
    multiprocessors: int
    shared_per_block: int
    shared_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int


CHIPS = {
    80: Chip("NVIDIA A100-SXM4-80GB", 108, 166912, 167936, 64, 32),
    86: Chip("NVIDIA A40", 84, 101376, 102400, 48, 16),
    89: Chip("NVIDIA L40S", 142, 101376, 102400, 48, 24),
    90: Chip("NVIDIA H100 80GB HBM3", 132, 232448, 233472, 64, 32),
    100: Chip("NVIDIA B200", 148, 232448, 233472, 64, 32),
    120: Chip("NVIDIA GeForce RTX 5090", 170, 101376, 102400, 48, 24),
}

# Set by _aot.dry_run and _recorder.recording to those of the chip that they imagine.
_dry_run_multiprocessors = 1
_dry_run_architecture = 90


def multiprocessors(device: torch.device) -> int:
    """SMs that a launch on ``device`` can fill; 1 on a CPU, where the interpreter runs one program after the other."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _dry_run_multiprocessors if device.type == "meta" else 1


def architecture(device: torch.device) -> int:
    """Compute capability of ``device``, ``90``; the interpreter on a CPU plays that one."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return _dry_run_architecture if device.type == "meta" else 90


def gpu_of(x: Tensor, arch: str) -> str:
    """Name of the GPU that ``x`` is on, by which tuned tables are found; elsewhere of the chip that stands for ``arch``."""
    return gpu_name(x.get_device(), arch)  # -1 on a CPU and on meta


@functools.cache  # launchers ask several times a block, and the driver takes longer
def gpu_name(index: int, arch: str) -> str:
    """Name of CUDA device ``index``; without one, -1, that of the chip of architecture ``arch``, as ``"sm_90"``."""
    if index >= 0:
        return torch.cuda.get_device_name(index)
    chip = next((chip for number, chip in CHIPS.items() if arch == f"sm_{number}"), None)
    return f"NVIDIA {arch}" if chip is None else chip.name
