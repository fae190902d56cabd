"""What launchers ask of the device that they launch on, and the chips that ahead-of-time compilation knows. No Triton here."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of an architecture (CUDA C++ programming guide, table of compute capabilities), sizes in bytes."""

    name: str
    multiprocessors: int
    shared_per_block: int
    shared_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int


CHIPS = {
    80: Chip("A100", 108, 166912, 167936, 64, 32),
    86: Chip("A40", 84, 101376, 102400, 48, 16),
    89: Chip("L40S", 142, 101376, 102400, 48, 24),
    90: Chip("H100", 132, 232448, 233472, 64, 32),
    100: Chip("B200", 148, 232448, 233472, 64, 32),
    120: Chip("RTX 5090", 170, 101376, 102400, 48, 24),
}

# Set by _aot.dry_run to those of the chip that it compiles for.
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
