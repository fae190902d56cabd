"""Ahead-of-time compilation without a GPU, and what a compiled kernel's binary says about itself.

``dry_run`` gives Triton a driver that launches nothing: the unchanged launchers run on ``meta`` tensors, every launch
specialises as on the GPU (arguments equal to 1, multiples of 16) and compiles, every autotune configuration included. A
hand-written ``ASTSource`` without the same attributes would compile a different kernel.

``read`` takes a binary apart with the tools of the Triton wheel (cuobjdump, nvdisasm, ptxas) and keeps what it found beside
Triton's own cache.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import compiler as triton_compiler
from triton.runtime import JITFunction, driver

from . import _device
from ._device import CHIPS, Chip


class AotError(Exception):
    """Compiling or reading back cannot be done here; the message is one line and says why."""


class Shape(Protocol):
    """The dimensions of a ViT that ``aot_launches(shape)`` of a kernel file reads; a workload has them all."""

    tokens: int
    width: int
    num_heads: int
    hidden: int
    patch: int
    image: int
    train_batch: int


_REGISTERS_PER_SM = 65536
_TENSOR_MEMORY_COLUMNS = 512
_RESERVED_SHARED = 1024  # bytes that the system takes of every block

# SASS mnemonics by what they are.
_MMA = {
    "HMMA": ("HMMA", "IMMA", "QMMA", "OMMA"),
    "HGMMA": ("HGMMA", "IGMMA", "QGMMA"),
    "tcgen05": ("UTCHMMA", "UTCIMMA", "UTCQMMA", "UTCOMMA"),
}
_TMA = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP")
_GLOBAL = ("LDG", "STG", "LDGSTS")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)", re.MULTILINE)
_DOT = re.compile(r"tt\.dot .*")
_USAGE = re.compile(r"Function \S+:\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


# 1. Compiling.


class _Utils:
    def __init__(self, chip: Chip) -> None:
        self._chip = chip

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self._chip.shared_per_block,
            "max_num_regs": _REGISTERS_PER_SM,
            "multiprocessor_count": self._chip.multiprocessors,
            "warpSize": 32,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads a block

    def unload_module(self, module: int) -> None:
        pass


class _Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class _Driver:
    """What Triton asks of a driver, for a chip that is not there."""

    launcher_cls = _Launcher

    def __init__(self, arch: int) -> None:
        self._arch = arch
        self.utils = _Utils(CHIPS[arch])

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch  # a JITFunction keeps one cache of compiled kernels a device: so one an architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self._arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(call: Callable[[], object], **kwargs: Any) -> list[float]:
            call()
            return [0.0, 0.0, 0.0]

        return benchmark  # an autotuner compiles all its configurations

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def dry_run(arch: int) -> Iterator[list[Any]]:
    """Compile what is launched on ``meta`` tensors inside, for compute capability ``arch`` (``90``), and launch nothing.

    Yields:
        the list to which every launch appends its ``CompiledKernel``, also one that takes more shared memory than the chip
        has (``read`` says so).

    Raises:
        AotError: Triton interprets in this process, which leaves its language patched.
    """
    if knobs.runtime.interpret:
        raise AotError("kernels cannot be compiled in a process that interprets them: unset TRITON_INTERPRET")
    compiled: list[Any] = []
    launch = JITFunction.run

    def launch_and_keep(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = launch(self, *args, **kwargs)
        compiled.append(kernel.result() if hasattr(kernel, "result") else kernel)  # compiled asynchronously, or not
        return kernel

    # _active, not active: without a GPU the property would look for a driver and raise.
    before = driver._active, triton_compiler.max_shared_mem
    device_before = _device._dry_run_multiprocessors, _device._dry_run_architecture
    driver.set_active(_Driver(arch))
    triton_compiler.max_shared_mem = lambda device: 2**31
    _device._dry_run_multiprocessors, _device._dry_run_architecture = CHIPS[arch].multiprocessors, arch
    JITFunction.run = launch_and_keep
    try:
        yield compiled
    finally:
        JITFunction.run = launch
        driver._active, triton_compiler.max_shared_mem = before
        _device._dry_run_multiprocessors, _device._dry_run_architecture = device_before


# 2. Reading back.


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses; sizes in bytes, instructions counted as they stand in the binary.

    Attributes:
        kernel: the function's name; arch: compute capability, ``90``; num_warps: of a block; num_stages: Triton's pipeline.
        constants: the integers among its constexpr arguments.
        registers, stack_bytes: of a thread. spill_bytes, spill_load_bytes: stored to and loaded from the stack for want of
            registers, as ptxas counts them.
        shared_bytes: of a block; shared_limit: what the chip gives one. tensor_memory_columns: of 512 (sm_100).
        has_dot: the source multiplies matrices other than of true float32, so ``mma`` should not be all zero.
        mma, tma, async_copies, local_loads, local_stores, instructions: instruction counts, padding left out.
        wide_global, global_accesses: global loads, stores and asynchronous copies, and those among them of 128 bits or more.
        blocks_per_sm, limited_by: occupancy, and which of regs, smem, tmem (tensor memory), warps, blocks runs out first.
    """

    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    constants: dict[str, int]
    registers: int
    stack_bytes: int
    spill_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_memory_columns: int
    has_dot: bool
    mma: dict[str, int]
    tma: int
    async_copies: int
    local_loads: int
    local_stores: int
    wide_global: int
    global_accesses: int
    instructions: int
    blocks_per_sm: int
    limited_by: str


def read(kernel: Any, arch: int) -> Resources:
    """Take a ``CompiledKernel`` apart; instant for a binary that was read before.

    Raises:
        AotError: the Triton wheel lacks the tool, or the tool failed.
    """
    meta = kernel.metadata
    binary = _cached(kernel, arch)
    shared = meta.shared + binary.pop("static_shared_bytes")
    columns = getattr(meta, "tmem_size", 0) or 0
    blocks, limited_by = occupancy(arch, meta.num_warps, binary["registers"], shared, columns)
    return Resources(
        kernel=kernel.src.fn.__name__,
        arch=arch,
        num_warps=meta.num_warps,
        num_stages=meta.num_stages,
        constants=_constants(kernel.src),
        shared_bytes=shared,
        shared_limit=CHIPS[arch].shared_per_block,
        tensor_memory_columns=columns,
        has_dot=any(map(_for_tensor_cores, _DOT.findall(kernel.asm["ttir"]))),  # helpers are inlined there
        blocks_per_sm=blocks,
        limited_by=limited_by,
        **binary,
    )


def occupancy(arch: int, warps: int, registers: int, shared_bytes: int, columns: int = 0) -> tuple[int, str]:
    """Blocks of ``warps`` warps that fit on an SM, and what keeps the next one out (0 blocks: it does not run at all)."""
    chip = CHIPS[arch]
    # Registers go to a warp in units of 256, and an SM is four quarters with a file each.
    warps_by_registers = _REGISTERS_PER_SM // 4 // max(-(-registers * 32 // 256) * 256, 256) * 4
    shared = -(-shared_bytes // 128) * 128 + _RESERVED_SHARED
    limits = {
        "regs": warps_by_registers // warps,
        "smem": chip.shared_per_sm // shared,
        "tmem": _TENSOR_MEMORY_COLUMNS // columns if columns else chip.blocks_per_sm,
        "warps": chip.warps_per_sm // warps,
        "blocks": chip.blocks_per_sm,
    }
    limited_by = min(limits, key=lambda name: limits[name])
    return limits[limited_by], limited_by


def _for_tensor_cores(dot: str) -> bool:
    """Of a line of Triton's IR: float32 without TF32 goes to the ordinary units."""
    return "xf32> *" not in dot or "tf32" in dot


def _constants(src: Any) -> dict[str, int]:
    names = src.fn.arg_names
    found = {names[path[0]]: value for path, value in src.constants.items()}
    return {name: int(value) for name, value in found.items() if name.isupper() and isinstance(value, int)}


def _cached(kernel: Any, arch: int) -> dict[str, Any]:
    # The tools belong to the Triton wheel; this file is how they are asked and understood.
    parts = (kernel.asm["cubin"], kernel.asm["ptx"].encode(), triton.__version__.encode(), Path(__file__).read_bytes())
    key = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    path = Path(knobs.cache.dir) / "vitkernels-inspect" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    found = _read_binary(kernel, arch)
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{key}.{os.getpid()}")
        unfinished.write_text(json.dumps(found), encoding="utf-8")
        unfinished.replace(path)
    return found


def _read_binary(kernel: Any, arch: int) -> dict[str, Any]:
    try:
        temporary = tempfile.TemporaryDirectory()
    except OSError as error:
        raise AotError(f"a folder for temporary files is needed: {error}") from error
    with temporary as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _USAGE.findall(_tool("cuobjdump", "--dump-resource-usage", str(cubin)))
        if not usage:
            raise AotError(f"cuobjdump reports no resource usage for {kernel.src.fn.__name__}")
        registers, stack, static_shared, _ = map(int, usage[-1])
        counts = count(_tool("nvdisasm", "-c", str(cubin)))
        spills = (0, 0)
        if stack or counts["local_loads"] or counts["local_stores"]:
            spills = _spills(kernel, arch, Path(folder))
    return {
        "registers": registers,
        "stack_bytes": stack,
        "static_shared_bytes": static_shared,
        "spill_bytes": spills[0],
        "spill_load_bytes": spills[1],
        **counts,
    }


def count(sass: str) -> dict[str, Any]:
    """Instructions by kind in nvdisasm's text."""
    found = [(name, suffix) for name, suffix in _INSTRUCTION.findall(sass) if name != "NOP"]
    names = Counter(name for name, _ in found)
    memory = [suffix for name, suffix in found if name in _GLOBAL]
    return {
        "mma": {kind: sum(names[name] for name in members) for kind, members in _MMA.items()},
        "tma": sum(names[name] for name in _TMA),
        "async_copies": names["LDGSTS"],
        "local_loads": names["LDL"],
        "local_stores": names["STL"],
        "wide_global": sum(1 for suffix in memory if ".128" in suffix or ".256" in suffix),
        "global_accesses": len(memory),
        "instructions": len(found),
    }


def _spills(kernel: Any, arch: int, folder: Path) -> tuple[int, int]:
    """Bytes of spill stores and loads: only ptxas, asked again with Triton's own flags, tells them from other stack use."""
    meta = kernel.metadata
    ptx = folder / "kernel.ptx"
    ptx.write_text(kernel.asm["ptx"], encoding="utf-8")
    flags = [] if meta.enable_fp_fusion else ["--fmad=false"]
    workaround = "--regAllocOptLevel=2"  # which Triton 3.9 passes and 3.6 does not
    flags += [workaround] if workaround in Path(nvidia.__file__).read_text(encoding="utf-8") else []
    flags += (getattr(meta, "ptx_options", None) or "").split()
    target = f"--gpu-name={nvidia.sm_arch_from_capability(arch)}"
    command = [nvidia.get_ptxas(arch).path, "-v", *flags, target, str(ptx), "-o", str(folder / "again.cubin")]
    found = _SPILLS.findall(_run(command).stderr)
    return sum(int(stores) for stores, _ in found), sum(int(loads) for _, loads in found)


def _tool(name: str, *args: str) -> str:
    return _run([tool_path(name), *args]).stdout


@functools.cache  # Triton runs the tool to see that it works
def tool_path(name: str) -> str:
    """Path of ``cuobjdump`` or ``nvdisasm``, from the Triton wheel or the environment variable that Triton reads.

    Raises:
        AotError: it is in neither.
    """
    try:
        return getattr(knobs.nvidia, name).path
    except RuntimeError:
        pass
    raise AotError(f"{name} is missing from this Triton installation; set TRITON_{name.upper()}_PATH to the CUDA toolkit's")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise AotError(f"{Path(command[0]).name} failed: {(result.stderr or result.stdout).strip()}")
    return result
