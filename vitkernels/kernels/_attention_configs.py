"""How attention is launched: tiles, warps and stages by shape and chip, and what a tuned table may say instead.

A table's entry stands for 16-bit self-attention without a bias, under a direction, a dtype, a head dim and a bucket of
lengths. An entry that this shape or chip cannot run is passed over, with a warning, for the default.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from . import _tuned
from ._device import CHIPS

_logger = logging.getLogger("vitkernels")
# Chips (compute capability / 10) whose products read shared memory: elsewhere a resident K and V would fill the registers.
_READS_SHARED = (9, 10)


class ForwardConfig(NamedTuple):
    """How the forward runs one shape.

    ``resident``: K and V stay in shared memory while a program takes several tiles of ``block_m`` queries, and ``online``
    says whether the output is rescaled from key block to key block, which takes fewer registers. Otherwise keys are streamed,
    ``block_n`` at a time.
    """

    resident: bool
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    online: bool = False


class BackwardConfig(NamedTuple):
    """How the backward runs one shape.

    ``block``: rows of dq, or of dk and dv, at a time. ``key_step``: keys that dq adds up at a time; ``query_step``: queries
    that dk and dv add up at a time.
    """

    one_program: bool
    block: int
    query_step: int
    key_step: int
    num_warps: int
    num_stages: int


_Config = TypeVar("_Config", ForwardConfig, BackwardConfig)


def key(direction: str, dtype: torch.dtype, N: int, Dh: int) -> str:
    """Of a table's entry: lengths share one by 64 up to 512, then by powers of two."""
    return f"{direction}/{_tuned.dtype_name(dtype)}/{Dh}/{-(-N // 64) * 64 if N <= 512 else triton.next_power_of_2(N)}"


def _from_table(kind: type[_Config], gpu: str, key: str, why_not: Callable[[_Config], str]) -> _Config | None:
    entry = _tuned.lookup(gpu, "attention", key)
    if entry is None or entry.get("plan") == "default":
        return None
    try:
        config = kind(**entry["config"])
        wrong = why_not(config)
    except (KeyError, TypeError) as error:
        wrong = str(error)
    if wrong:
        _warn(gpu, key, wrong)
        return None
    return config


@functools.cache  # once each
def _warn(gpu: str, key: str, wrong: str) -> None:
    _logger.warning("the tuned entry %s of attention on %s is ignored: %s", key, gpu, wrong)


def entry(config: ForwardConfig | BackwardConfig) -> dict[str, Any]:
    """A tuned table's entry that chooses ``config``."""
    return {"plan": "tuned", "config": config._asdict()}


def _not_of(numbers: dict[str, tuple[int, tuple[int, ...]]]) -> str:
    wrong = (f"{name} is {n!r}, not one of {allowed}" for name, (n, allowed) in numbers.items() if n not in allowed)
    return next(wrong, "")


def _too_large(arch: int, rows: int, width: int) -> str:
    """``rows`` of 16-bit channels in shared memory: the least that a configuration needs."""
    limit = CHIPS[max((a for a in CHIPS if a <= arch), default=80)].shared_per_block
    taken = rows * width * 2
    return f"it takes {taken} bytes of shared memory, sm_{arch} has {limit}" if taken > limit else ""


# Forward.


def _parts(Dh: int) -> tuple[int, ...]:
    """Up to three powers of two of 16 and more that hold Dh channels: 72 and 80 are 64 + 16, 88 and 96 are 64 + 32."""
    padded = -(-Dh // 16) * 16
    parts = tuple(1 << bit for bit in range(8, 3, -1) if padded >> bit & 1)
    return parts if len(parts) <= 3 else (256,)


def forward_parts(arch: int, dtype: torch.dtype, Dh: int, full_bias: bool) -> dict[str, int]:
    """104 is 64 + 32 + 16. Those of the backward in float32: its logits are the forward's to the bit only if it adds up the
    same parts, and a single key's p is 1.
    """
    parts = backward_parts(arch, dtype, Dh, full_bias) if dtype == torch.float32 else _parts(Dh)
    return dict(zip(("D0", "D1", "D2"), [*parts, 0, 0][:3], strict=True))


def _key_blocks(num_keys: int) -> list[int]:
    """Blocks of 128, then one of 64 if more than 64 keys are left, then the smallest that takes the rest: 128 + 64 + 16."""
    blocks = [128] * (num_keys // 128)
    rest = num_keys % 128
    if rest > 64:
        blocks, rest = [*blocks, 64], rest - 64
    return [*blocks, max(16, triton.next_power_of_2(rest))] if rest else blocks


def _block_m(num_queries: int, largest: int) -> int:
    """The largest of 16, 32, 64 and 128 queries a tile that wastes no more rows than a smaller one: 128 at 197, 64 at 257."""
    smallest = min(64, largest, max(16, triton.next_power_of_2(num_queries)))
    return min((m for m in (128, 64, 32, 16) if smallest <= m <= largest), key=lambda m: -(-num_queries // m) * m)


def _stream_blocks(arch: int, dtype: torch.dtype, width: int, full_bias: bool) -> tuple[int, int, int]:
    """The most queries a tile, keys a block, and stages of the pipeline: what the resource report shows not to spill."""
    if dtype == torch.float32:  # multiplied without tensor cores, the operands held in registers
        return 32, 16, 1
    mma_sync = arch // 10 not in _READS_SHARED
    if width > 128 or (width == 128 and full_bias and arch // 10 != 9):
        return 64, 16 if full_bias else 32, 2
    keys = 32 if full_bias or width == 112 or (mma_sync and width > 80) else 64
    if full_bias and mma_sync and width > 64:
        keys = 16
    return 128, keys, 2 if mma_sync or full_bias else 3


def forward_config(
    arch: int, gpu: str, dtype: torch.dtype, N: int, M: int, Dh: int, biased: bool, full_bias: bool, packed: bool
) -> ForwardConfig:
    """That of the table of ``gpu``, or the default. ``full_bias``: one with a row for each query."""
    width = sum(_parts(Dh))
    if dtype != torch.float32 and N == M and not biased and not packed:
        tuned = _from_table(ForwardConfig, gpu, key("forward", dtype, N, Dh), lambda c: why_not_forward(c, arch, N, Dh))
        if tuned is not None:
            return tuned
    blocks = _key_blocks(M)
    padded = sum(blocks)
    # Registers a thread grow with the logits of all keys and the output: about 250 at 336 on sm_90, at 272 on sm_100.
    one_pass = padded <= 256 and padded + width <= (272 if arch // 10 != 9 else 320 if biased else 336)
    # Two programs share an SM as long as K, V and 64 queries are below 113 KB. A bias for each query takes registers too.
    shared = (2 * padded + 64) * width * 2
    # Rescaled and with a mask of keys, 257 keys of 80 channels spill 140 bytes in Triton 3.6.
    few = one_pass or (width <= 80 and not (biased and padded + width > 336))
    fits = 1 <= len(blocks) <= 3 and shared <= 113 * 1024 and few and not full_bias and not packed
    if arch // 10 in _READS_SHARED and dtype != torch.float32 and fits and N > 16:
        return ForwardConfig(True, 64, 0, 4, 1, not one_pass)
    largest, block_n, stages = _stream_blocks(arch, dtype, width, full_bias)
    block_m = min(largest, 64) if packed else _block_m(N, largest)
    if block_m == 64 and arch // 10 not in _READS_SHARED and dtype != torch.float32:
        if biased:  # 12 bytes of spills at 261 keys on sm_120
            block_n = min(block_n, 32)
        if width == 96:  # 8 at 177 keys on sm_80
            block_n = 16
    if packed and width > 96 and arch // 10 != 9 and dtype != torch.float32:  # 12 bytes of spills at Dh = 128 on sm_100
        block_n //= 2
    if block_m == 16:  # one query: attention pooling
        block_n, stages = min(block_n, 32), min(stages, 2)
    wide = dtype == torch.float32 and block_m == 32 and width > 64
    return ForwardConfig(False, block_m, block_n, 8 if block_m == 128 or wide else 4, stages)


def why_not_forward(config: ForwardConfig, arch: int, N: int, Dh: int) -> str:
    """Why a table's entry cannot run self-attention of N tokens; empty if it can."""
    width, blocks = sum(_parts(Dh)), _key_blocks(N)
    wrong = _not_of({"num_warps": (config.num_warps, (4, 8)), "num_stages": (config.num_stages, (1, 2, 3, 4))})
    if wrong:
        return wrong
    if config.resident:
        if arch // 10 not in _READS_SHARED or len(blocks) > 3 or N <= 16:
            return f"K and V of {N} tokens are not kept in shared memory on sm_{arch}"
        rows = 2 * sum(blocks) + config.block_m
        return _not_of({"block_m": (config.block_m, (64, 128))}) or _too_large(arch, rows, width)
    wrong = _not_of({"block_m": (config.block_m, (16, 32, 64, 128)), "block_n": (config.block_n, (16, 32, 64, 128))})
    return wrong or _too_large(arch, config.block_m + 2 * config.num_stages * config.block_n, width)


def forward_constants(
    arch: int,
    config: ForwardConfig,
    heads: int,
    multiprocessors: int,
    parts: dict[str, int],
    dtype: torch.dtype,
    N: int,
    M: int,
    packed: bool,
) -> dict[str, int]:
    """Constants of the kernel, and Triton's options. ``heads``: of all images."""
    width = sum(parts.values())
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if not config.resident:
        if dtype == torch.float32 and config.num_warps == 8 and width <= 128:
            options["maxnreg"] = 128  # ptxas would rather spill 8 bytes for a third program on an SM
        if dtype != torch.float32 and config.block_m == 64 and arch // 10 == 10:
            options["maxnreg"] = 255  # and here 4 to 8, between 50 and 177 keys
        rest = M % config.block_n
        tail = min(config.block_n, 32) if packed else max(16, triton.next_power_of_2(rest)) if rest else 0
        if arch // 10 != 9:
            tail = min(tail, max(16, config.block_n // 2))  # up to 60 bytes of spills with a full one: 100 keys of 72 channels
        return {**parts, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "TAIL": tail, **options}
    blocks = _key_blocks(M)
    keys = dict(zip(("KEYS0", "KEYS1", "KEYS2"), [*blocks, 0, 0][:3], strict=True))
    tiles = triton.cdiv(N, config.block_m)
    # A program takes more than one tile when there are two waves of two programs an SM, or where one alone, which is no loop
    # any more, spills: 36 bytes at 256 keys of 64 channels.
    splits = min(tiles, triton.cdiv(4 * multiprocessors, max(1, heads)))
    taken = max(triton.cdiv(tiles, splits), 2 if sum(blocks) + width > 304 and not config.online else 1)
    flags = {"LAST_MASKED": sum(blocks) != M, "ONLINE": config.online}
    return {**parts, **keys, "BLOCK_M": config.block_m, **flags, "TILES": taken, **options}


# Backward.


def backward_parts(arch: int, dtype: torch.dtype, Dh: int, biased: bool) -> tuple[int, ...]:
    """104 is one part of 128: split in three, it spills. So do 88 and 96 with a bias where operands are in registers.

    In float32 a thread holds whole rows of both operands: two parts of 64, as 128 channels would spill 490 bytes.
    """
    if dtype == torch.float32:
        return (64, 64) if 96 < Dh <= 128 else _parts(Dh)
    if 96 < Dh <= 128 or (biased and arch not in (90, 100) and 80 < Dh <= 128):
        return (128,)
    return _parts(Dh)


def backward_config(
    arch: int,
    gpu: str,
    dtype: torch.dtype,
    heads: int,
    N: int,
    M: int,
    Dh: int,
    fills: int,
    biased: bool,
    plain: bool,
    packed: bool,
) -> BackwardConfig:
    """That of the table of ``gpu`` if the call is ``plain``, without bias or packing, or else the largest tiles that compile
    without a spill (for Dh up to 128), read from the binaries.

    ``fills``: programs that fill the chip. Fewer heads, longer ones and wide ones are cut into blocks of rows. ``biased``: by
    a bias for each query and key.
    """
    if dtype != torch.float32 and N == M and plain:
        tuned = _from_table(BackwardConfig, gpu, key("backward", dtype, N, Dh), lambda c: why_not_backward(c, arch, Dh))
        # One program a head was measured with heads enough for the chip.
        if tuned is not None and (heads >= fills or not tuned.one_program):
            return tuned
    if dtype == torch.float32:  # no tensor cores
        rows = 32 if Dh <= 176 else 16  # four tiles of as many: 101,376 bytes of shared memory on sm_86, 89 and 120
        return BackwardConfig(False, rows, rows, rows, 8, 1)
    # One query is no work for a program that has the head alone: on sm_100 it would spill 44 bytes.
    alone = N > 1 and max(N, M) <= 320 and heads >= fills and not biased
    if arch in (90, 100):  # operands in shared memory
        # Rows of 76 channels are read 8 bytes at a time, from twice the addresses: on sm_90, 32 queries a step spill 36 bytes
        # in one program and 140 to 156 with a bias, 16 nothing in Triton 3.6 and 3.8.
        uneven = Dh > 64 and Dh % 8 != 0
        if alone and Dh <= 80:
            return BackwardConfig(True, 64, 16 if uneven and arch == 90 else 32, 32, 4, 1)
        if Dh <= 64 and not biased:  # on sm_100 in 3.8, packed, 64 keys a step spill 28 bytes at Dh = 64, 132 at 48; 32 none
            return BackwardConfig(False, 64, 32, 32 if packed and arch == 100 and Dh > 32 else 64, 4, 2)
        # With a bias, at 72 to 80 channels on sm_100, 32 keys a step spill 124 to 148 bytes in 3.8 and none in 3.6, 16 nothing
        # in both, and with 16 queries a third program fits an SM in 3.8.
        if biased and arch == 100 and 64 < Dh <= 80:
            return BackwardConfig(False, 64, 16, 16, 4, 2)
        # Packed, dk and dv of 32 queries a step spill on sm_90: 8 bytes in Triton 3.6 at Dh = 88, 16 to 40 in 3.8 at 88 to
        # 128, none in 3.9; of 16 in none of the three. On sm_100 dq spills, too: 4 warps up to 168 bytes in 3.6 and 3.8, with
        # 16 queries as with 32, and 8 warps with 32 queries 104 in 3.8 above 96; with 16 nothing in both (8 at Dh = 76 in 3.8).
        if packed and arch == 100 and Dh <= 128:
            return BackwardConfig(False, 64, 16, 32, 8, 2)
        few_queries = (Dh > 80 or uneven) and (biased or packed)
        if Dh <= 128:
            return BackwardConfig(False, 64, 16 if few_queries else 32, 32, 4 if Dh <= 96 else 8, 2)
        return BackwardConfig(False, 64, 16, 16, 8, 1)
    if Dh <= 64:  # operands in registers
        return BackwardConfig(alone, 64, 16, 32, 4, 1 if alone or biased else 2)
    return BackwardConfig(False, 32, 16, 32, 8, 1)


def why_not_backward(config: BackwardConfig, arch: int, Dh: int) -> str:
    """Why a table's entry cannot run; empty if it can."""
    tiles, width = (16, 32, 64, 128), sum(backward_parts(arch, torch.bfloat16, Dh, False))
    wrong = _not_of(
        {
            "block": (config.block, tiles),
            "query_step": (config.query_step, tiles),
            "key_step": (config.key_step, tiles),
            "num_warps": (config.num_warps, (4, 8)),
            "num_stages": (config.num_stages, (1, 2, 3, 4)),
        }
    )
    # Two tensors of a step; those of the block may be in registers.
    rows = 0 if wrong else 2 * config.num_stages * max(config.query_step, config.key_step)
    return wrong or _too_large(arch, rows, width)


def backward_tail(n: int, block: int) -> int:
    """The smallest tile for what full blocks leave of ``n`` rows: 16 for 197 = 3 * 64 + 5."""
    return max(16, triton.next_power_of_2(n % block)) if n % block else 0
