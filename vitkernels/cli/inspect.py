"""``vitkernels inspect``: what the compiled kernels use of a GPU, read from their binaries on a machine without one.

Kernel files name launches in bfloat16, float32 and autocast's mix of both. float16 compiles to bfloat16's code but for the
conversions and is left out: compared for sm_80 and sm_90, LayerNorm and patch embedding of ViT-B are within 8 registers of each
other, with as many blocks an SM, no spills, and in float16 up to 8% fewer instructions.
"""

import argparse
import dataclasses
import itertools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import _env, _select
from ..kernels._device import CHIPS
from . import _compiled
from ._models import listed, positive
from ._output import CommandError, console, progress
from ._workloads import WORKLOADS, Workload

_DEFAULT_ARCHS = "80,90"


def _spills(row: dict[str, Any]) -> str | None:
    spilled = _compiled.spilled(row)
    return f"spills {spilled} bytes of registers" if spilled else None


def _smem(row: dict[str, Any]) -> str | None:
    if row["shared_bytes"] <= row["shared_limit"]:
        return None
    return f"takes {row['shared_bytes']} bytes of shared memory, the chip has {row['shared_limit']} for a block"


def _no_mma(row: dict[str, Any]) -> str | None:
    return "multiplies matrices without a tensor-core instruction" if row["has_dot"] and not any(row["mma"].values()) else None


CHECKS = {"spills": _spills, "smem": _smem, "no-mma": _no_mma}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register the command."""
    text = "registers, spills, shared memory and instructions of every kernel, compiled without a GPU"
    parser = subparsers.add_parser("inspect", help=text, description=text, allow_abbrev=False)
    parser.add_argument("stem", nargs="?", help="a file of vitkernels/kernels: layer_norm, ... (default: all)")
    parser.add_argument(
        "--arch", default=_DEFAULT_ARCHS, help=f"compute capabilities to compile for (default: {_DEFAULT_ARCHS})"
    )
    parser.add_argument("--workload", help="only the shapes of these, B/16,So400m/14 for example (default: all)")
    heads = "heads of so many channels instead of the workloads' own, 72,88 for example"
    parser.add_argument("--head-dims", type=listed(positive), metavar="A,B", help=heads)
    record = "put registers, spilled bytes and blocks an SM of what compiled into this table, under the version of Triton"
    parser.add_argument("--record", type=Path, metavar="FILE.json", help=record)
    parser.add_argument("--fail-on", default="", metavar="CHECKS", help=f"exit with 1 on any of {','.join(CHECKS)}")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compile and read back; ``errors`` has a line for each violation of ``--fail-on``."""
    checks, archs, shapes = _checks(args.fail_on), _archs(args.arch), _shapes(args.workload, args.head_dims)
    if not _env.HAS_TRITON:
        raise CommandError("inspect compiles with Triton, which is not installed")
    stems = _stems(args.stem)
    if _env.INTERPRETING:
        raise CommandError("kernels cannot be compiled in a process that interprets them: unset TRITON_INTERPRET")
    from ..kernels import _aot as aot

    table = {} if args.record is None else _table(args.record)
    try:
        rows, errors = _compile(aot, stems, shapes, archs)
    except aot.AotError as error:
        raise CommandError(str(error)) from error
    if args.record is not None:
        _compiled.merge(table, rows, aot.triton.__version__)
        try:
            _compiled.write(args.record, table)
        except OSError as error:
            raise CommandError(f"--record: cannot write {args.record}: {error.strerror or error}") from error
    return {"archs": archs, "rows": rows, "errors": errors + violations(rows, checks)}


def violations(rows: list[dict[str, Any]], checks: list[str]) -> list[str]:
    """One line for each row and check of ``CHECKS`` that it fails."""
    found = ((row, CHECKS[check](row)) for row in rows for check in checks)
    return [f"{row['stem']}: {row['kernel']} ({row['config']}, sm_{row['arch']}) {what}" for row, what in found if what]


def _checks(text: str) -> list[str]:
    checks = [name.strip() for name in text.split(",") if name.strip()]
    for name in checks:
        if name not in CHECKS:
            raise CommandError(f"--fail-on: unknown check {name!r}; accepted: {', '.join(CHECKS)}")
    return checks


def _archs(text: str) -> list[int]:
    names = [name.strip().removeprefix("sm_") for name in text.split(",")]
    for name in names:
        if name not in map(str, CHIPS):
            raise CommandError(f"--arch: unknown architecture {name!r}; accepted: {', '.join(map(str, CHIPS))}")
    return list(dict.fromkeys(map(int, names)))


def _table(path: Path) -> _compiled.Table:
    """What ``--record`` adds to, read before anything compiles."""
    if not path.parent.is_dir():
        raise CommandError(f"--record: cannot write {path}: its folder does not exist")
    try:
        return _compiled.read(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"--record: {path} is there and cannot be read: {error}") from error


def _shapes(text: str | None, head_dims: list[int] | None) -> list[Workload]:
    known = {workload.name: workload for workload in WORKLOADS}
    names = list(known) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise CommandError(f"--workload: unknown workload {name!r}; accepted: {', '.join(known)}")
    if head_dims is None:
        return [known[name] for name in names]
    return [dataclasses.replace(known[n], width=known[n].num_heads * Dh) for n in names for Dh in head_dims]


def _stems(wanted: str | None) -> dict[str, ModuleType]:
    """Kernel files that name their launches, by stem."""
    from ..kernels import _recorder  # imports Triton

    stems = {stem: module for stem, module in _recorder.modules().items() if hasattr(module, "aot_launches")}
    if wanted is None:
        return stems
    if wanted not in stems:
        raise CommandError(f"unknown stem {wanted!r}; there are kernels of: {', '.join(stems)}")
    return {wanted: stems[wanted]}


def _compile(
    aot: ModuleType, stems: dict[str, ModuleType], shapes: list[Workload], archs: list[int]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each distinct binary, and a line for each launch that does not compile."""
    found: dict[tuple[str, int, str], tuple[list[str], Future]] = {}
    errors = []
    # Reading waits for other programs: beside compiling it costs little.
    with progress() as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for arch, (stem, module) in itertools.product(archs, stems.items()):
            with aot.dry_run(arch) as compiled, _select.targeting(f"sm_{arch}"):
                launches = _launches(module, shapes)
                for config, launch in bar.track(launches.items(), description=f"{stem}, sm_{arch}"):
                    try:
                        launch()
                    except Exception as error:  # whatever a compiler raises: the other kernels are still worth a look
                        errors.append(f"{stem}: {config}, sm_{arch} does not compile: {type(error).__name__}: {error}")
                    for kernel in compiled:
                        key = (stem, arch, kernel.hash)
                        if key not in found:
                            found[key] = ([], pool.submit(aot.read, kernel, arch))
                        found[key][0].append(config)
                    compiled.clear()
        return [_row(stem, configs, read.result()) for (stem, _, _), (configs, read) in found.items()], errors


def _launches(module: ModuleType, shapes: list[Workload]) -> dict[str, Callable[[], None]]:
    """Each configuration once: many workloads have one width."""
    return {config: launch for shape in shapes for config, launch in module.aot_launches(shape)}


def _row(stem: str, configs: list[str], resources: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(resources)
    return {
        "stem": stem,
        "kernel": fields.pop("kernel"),
        "config": configs[0],
        "configs": list(dict.fromkeys(configs)),
        **fields,
    }


def show(document: dict[str, Any]) -> None:
    """Print one table for each architecture and stem."""
    from rich import box
    from rich.table import Table

    out = console()
    for (arch, stem), group in itertools.groupby(document["rows"], key=lambda row: (row["arch"], row["stem"])):
        table = Table(title=f"{stem}, sm_{arch}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in ("kernel", "configuration"):
            table.add_column(heading, no_wrap=True)
        for heading in _COLUMNS:
            table.add_column(heading, justify="right")
        for row in group:
            table.add_row(row["kernel"].strip("_").removesuffix("_kernel"), _configuration(row), *map(str, _cells(row)))
        out.print(table)
    out.print(_LEGEND)


_COLUMNS = ("warps", "regs", "spill", "stack", "smem", "mma", "TMA", "cp.async", "local", "128-bit", "instr", "blocks/SM")
_LEGEND = """\
regs, spill, stack: of a thread, the latter two in bytes    smem: bytes of a block    mma: tensor-core instructions
local: loads and stores    128-bit: share of the global accesses    instr: as they stand in the binary
blocks/SM: how many fit, and what keeps the next one out    +3: three more configurations have the same binary"""


def _configuration(row: dict[str, Any]) -> str:
    others = len(row["configs"]) - 1
    return row["config"] + (f" +{others}" if others else "")


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    wide, accesses = row["wide_global"], row["global_accesses"]
    return (
        row["num_warps"],
        row["registers"],
        row["spill_bytes"],
        row["stack_bytes"],
        row["shared_bytes"],
        " ".join(f"{number} {kind}" for kind, number in row["mma"].items() if number) or "0",
        row["tma"],
        row["async_copies"],
        row["local_loads"] + row["local_stores"],
        f"{100 * wide // accesses}%" if accesses else "",
        row["instructions"],
        f"{row['blocks_per_sm']} {row['limited_by']}",
    )
