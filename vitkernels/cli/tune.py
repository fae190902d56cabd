"""``vitkernels tune``: measures which plan and configuration is fastest on this GPU, and writes it into its tuned table."""

import argparse
import dataclasses
import importlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _env, _select, kernels
from ..kernels._device import gpu_of
from ..kernels._tuning import Case, Shape
from . import _environment, _models, _tuning
from ._output import CommandError, console, progress
from ._workloads import WORKLOADS

BATCHES = (256, 128, 64, 32, 16, 8, 1)
DTYPES = ("bfloat16", "float16")
_B16 = next(workload for workload in WORKLOADS if workload.name == "B/16")
_STEMS = ("linear", "attention", "patch_embed")  # by what tuning them gains; others come after these

_DESCRIPTION = """
Measure, for each operator that has a choice, every candidate at the shapes of the models: first its result at that very shape,
within the error budget beside PyTorch's, then its time, in interleaved rounds. What was faster than the plan without an entry
(of a linear layer: cuBLAS, then an elementwise pass) in nine of ten rounds is written into the table of this GPU's name, after
each case; the GEMMs of ViT-B/16 at 256 images are measured first. Started again, the command measures what the table lacks.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register the command."""
    text = "measure plans and block sizes on this GPU, and write the table that decides"
    parser = subparsers.add_parser("tune", help=text, description=_DESCRIPTION, allow_abbrev=False)
    names = f"timm names or sizes ({', '.join(_models.SIZES)}) (default: every workload)"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=names)
    batches = f"images, comma-separated (default: {','.join(map(str, BATCHES))}; of a workload at most what fills a GPU)"
    parser.add_argument("--batch-sizes", type=_models.listed(_models.positive), metavar="A,B", help=batches)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the products (default: %(default)s)")
    parser.add_argument("--device", help="cuda, cuda:1 (default: the GPU)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the table (default: this user's of the GPU's name)")
    parser.add_argument("--force", action="store_true", help="also measure what the table has")
    parser.add_argument("--budget", type=_seconds, metavar="SECONDS", help="begin nothing after this time")
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every case. A wrong result, or a case that cannot be decided, is named under ``errors``."""
    deadline = time.monotonic() + (args.budget or math.inf)
    device, arch = _gpu(args.device)
    gpu = gpu_of(torch.empty(0, device=device), arch)
    path = args.output or _tuning.user_table(gpu)
    known = _tuning.known(path)
    cases = _cases(args.models, args.batch_sizes, arch, getattr(torch, args.dtype))
    todo = [case for case in cases if args.force or case.key not in known.get(case.stem, {})]
    done: list[_tuning.Measured] = []
    with progress() as bar:
        task = bar.add_task("", total=len(cases), completed=len(cases) - len(todo))
        results = _tuning.measure(todo, device, arch, path, deadline)
        for case in todo:
            bar.update(task, description=f"{case.stem} {case.title}")
            found = next(results, None)
            if found is None:  # the budget is spent
                break
            done.append(found)
            bar.advance(task)
    environment = {**_environment.environment(), "device": str(device), "arch": arch, "gpu": gpu, "dtype": args.dtype}
    counts = {"kept": len(cases) - len(todo), "left": len(todo) - len(done)}
    rows = [found.row for found in done if found.row is not None]
    errors = [error for found in done for error in found.errors]
    return {"environment": environment, "table": str(path), "rows": rows, **counts, **({"errors": errors} if errors else {})}


def _gpu(text: str | None) -> tuple[torch.device, str]:
    """The GPU and its architecture, or why there is nothing to measure on."""
    device = _models.pick_device(text)
    arch = _select.target(torch.empty(0, device=device))
    if arch is None:
        raise CommandError("tune measures on an NVIDIA GPU, and there is none here: without a table cuBLAS's plan runs")
    with torch.cuda.device(device):
        reasons = _select.why_not_here(torch.empty(1, device=device))
    if _env.INTERPRETING:
        reasons.append("TRITON_INTERPRET is set")
    if reasons:
        raise CommandError(f"no kernel runs on {device}: {'; '.join(reasons)}")
    return device, arch


# What is measured.


def b16_gemms(arch: str, dtype: torch.dtype) -> list[Case]:
    """The GEMMs of a block of ViT-B/16 at 256 images, also with a LayerNorm folded in."""
    module = importlib.import_module(f"{kernels.__name__}._tuning_linear")  # imports Triton
    return list(module.cases(_B16, 256, arch, dtype))


def _makers() -> dict[str, Callable[[Shape, int, str, torch.dtype], Iterator[Case]]]:
    """``cases`` of each stem that can be tuned: of every ``kernels/_tuning_<stem>.py``."""
    prefix = "_tuning_"
    names = sorted(file.stem for file in Path(kernels.__file__).parent.glob(f"{prefix}*.py"))
    return {name.removeprefix(prefix): importlib.import_module(f"{kernels.__name__}.{name}").cases for name in names}


def _cases(models: list[str], batches: list[int] | None, arch: str, dtype: torch.dtype) -> list[Case]:
    """Each key once, at the most rows that share it. By stem and kind of case, large ones first: they compile the same code,
    and an interrupted run has measured what matters most. So do the GEMMs of ViT-B/16 at 256 images, before all others."""
    shapes: list[tuple[Shape, Sequence[int]]]
    if models:
        shapes = [(_shape(name), batches or BATCHES) for name in dict.fromkeys(map(_models.check_name, models))]
    else:
        shapes = [(w, batches or [b for b in BATCHES if b <= w.infer_batch]) for w in WORKLOADS]
    makers = sorted(_makers().items(), key=lambda item: _STEMS.index(item[0]) if item[0] in _STEMS else len(_STEMS))
    made = [[list(cases(shape, b, arch, dtype)) for shape, several in shapes for b in several] for _, cases in makers]
    found: dict[tuple[str, str], Case] = {}
    for stem in made:
        for same_kind in itertools.zip_longest(*stem):
            for case in sorted(filter(None, same_kind), key=lambda case: (case.kind, -case.rows)):
                found.setdefault((case.stem, case.key), case)
    first = {(case.stem, case.key) for case in b16_gemms(arch, dtype)}
    return sorted(found.values(), key=lambda case: (case.stem, case.key) not in first)


@dataclasses.dataclass(frozen=True)
class _ModelShape:
    tokens: int
    width: int
    num_heads: int
    hidden: int
    act: str
    patch: int
    image: int


def _shape(name: str) -> Shape:
    """Of a model's blocks, which are alike in every ViT that can be fused, and of its patch embedding."""
    from ..models import FusedBlock, FusedPatchEmbed
    from ..models.block import activation_name
    from . import roofline

    model = _models.fuse(roofline._on_meta(name), name)
    images = roofline._images(1, model.default_cfg["input_size"], torch.float32)
    (arguments, _), _ = roofline._block_arguments(model, images, name)
    block = next(module for module in model.modules() if isinstance(module, FusedBlock))
    _, tokens, width = arguments[0].shape
    stem = next((module for module in model.modules() if isinstance(module, FusedPatchEmbed)), None)
    patches = {0} if stem is None else set(stem.patch_size)
    patch, image = (patches.pop() if len(patches) == 1 else 0), model.default_cfg["input_size"][-1]
    act = activation_name(block.mlp.act)
    return _ModelShape(tokens, width, block.attn.num_heads, block.mlp.fc1.weight.shape[0], act, patch, image)


def show(document: dict[str, Any]) -> None:
    """Print what was decided, and where it stands."""
    from rich.table import Table

    out, rows, environment = console(), document["rows"], document["environment"]
    if rows:
        table = Table(title=f"tuned on {environment['gpu']}, {environment['dtype']}", title_justify="left")
        for column in ("operator", "case", "runs", "us", "us of baseline", "fastest / baseline"):
            table.add_column(column, justify="right" if "us" in column or "/" in column else "left", no_wrap=True)
        for row in rows:
            chosen, baseline = (f"{row['us'][row[key]]:.1f}" for key in ("chosen", "baseline"))
            ratio = f"{row['ratio']:.2f}x" if row["ratio"] else "-"
            table.add_row(row["stem"], row["title"], row["chosen"], chosen, baseline, ratio)
        out.print(table)
    counts = [f"{len(rows)} measured", f"{document['kept']} were there"]
    counts += [f"{document['left']} left for the next run"] if document["left"] else []
    broken = sorted({f"{name} ({why})" for row in rows for name, why in row["broken"].items()})
    out.print(f"{document['table']}: {', '.join(counts)}")
    for line in broken:
        out.print(f"did not run: {line}")
