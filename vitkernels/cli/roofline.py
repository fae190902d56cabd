"""``vitkernels roofline``: what a model's forward and backward move and compute, from shapes alone.

One *unit* is B * T * D * 2 bytes, the residual stream in bfloat16. Units count activations; weights and their gradients, which
do not grow with the batch, are apart as ``parameter_bytes``.
"""

import argparse
import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _select, ops
from . import _ledger, _models
from ._chips import CHIPS, Chip
from ._ledger import Count, Operator
from ._output import CommandError, console, picture_path, progress, save_picture
from ._workloads import WORKLOADS

BATCHES = (1, 8, 64, 256)
PATHS = ("autocast", "fused_autocast", "eager", "fused")
FOLDED = "folded"
# Of the rates that a large GEMM and a copy reach: shares that reproduce timm's published compile/eager ratios within 2.5 % on
# an H200 (attention: 330 of 790 TFLOP/s).
ATTAINED_FLOPS = {"matrix products": 0.82, "attention": 0.42}
ATTAINED_BYTES = 0.85
# Host time, which is all that counts at small batches: an eager operator's (assumed), and that of an operator of ours with
# Triton's launcher (5 us and 10 to 16 us measured on a CPU).
HOST_US, HOST_US_OURS = 6.0, 18.0

_DESCRIPTION = """
Count the operators of a timm ViT, stock and fused, on tensors without data: no GPU, no weights. Bytes are those of perfect
caching within each operator, in bfloat16 (autocast: CUDA's, of float32 parameters), dropout off. Fused: with the plans that
dispatch selects on that chip; every plan that operators declare is counted beside it, by name, and folded: plan triton after
fuse(inference=True), of a block between two others, which hand row statistics on. Floor: every operator at the
chip's rates. Predicted: at the shares of them that PyTorch's kernels reach, and not below the host's time to launch. Ideal:
matrix products at the full rate, and nothing moved but images, weights and logits.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register the command."""
    parser = subparsers.add_parser(
        "roofline", help="bytes, FLOPs and floor times of a model, counted", description=_DESCRIPTION, allow_abbrev=False
    )
    names = f"timm names or sizes ({', '.join(_models.SIZES)}) (default: every workload)"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=names)
    parser.add_argument("--chip", default="h200", choices=CHIPS, help="whose datasheet rates count (default: h200)")
    parser.add_argument("--tflops", type=_rate, help="measured dense bfloat16 rate of the chip, 10^12 FLOP/s")
    parser.add_argument("--gbs", type=_rate, help="measured memory rate of the chip, 10^9 bytes/s, reads and writes")
    parser.add_argument("--batch", type=_models.positive, default=256, help="images in the operator tables (default: 256)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw units and predicted images per second")
    return parser


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Count every model."""
    plot = picture_path(args.plot, "--plot") if args.plot else None
    chip = _chip(args)
    names = list(dict.fromkeys(map(_models.check_name, args.models or [w.timm_name for w in WORKLOADS])))
    models = {}
    with progress() as bar:
        task = bar.add_task("", total=len(names))
        for name in names:
            bar.update(task, description=name)
            models[name] = _model(name, args.batch, chip)
            bar.advance(task)
    document = {"chip": {"name": args.chip, **dataclasses.asdict(chip)}, "batch": args.batch, "models": models}
    if plot:
        from ._roofline_plot import figure

        save_picture(figure(document), plot)
    return document


def _chip(args: argparse.Namespace) -> Chip:
    chip = CHIPS[args.chip]
    shares = (1.0 if args.tflops else chip.attainable[0], 1.0 if args.gbs else chip.attainable[1])
    given = [f"{name} measured" for name, rate in (("TFLOP/s", args.tflops), ("GB/s", args.gbs)) if rate]
    source = ", ".join(given + ([chip.source] if len(given) < 2 else []))
    tflops, gbs = args.tflops or chip.tflops, args.gbs or chip.gbs
    return dataclasses.replace(chip, tflops=tflops, gbs=gbs, source=source, attainable=shares)


def _model(name: str, batch: int, chip: Chip) -> dict[str, Any]:
    """Everything about one model: stock and fused, in bfloat16 and, of float32 parameters, under autocast."""
    model = _on_meta(name)
    size = model.default_cfg["input_size"]
    arguments, depth = _block_arguments(model, _input(model, batch), name)
    tokens, width = arguments[0][0].shape[1:]
    unit = batch * tokens * width * 2
    paths = {"autocast": _path(model, name, batch, unit, chip, autocast=True)}
    model = model.to(torch.bfloat16)
    paths["eager"] = _path(model, name, batch, unit, chip)
    forwards = {"eager": {b: _forward(model, b, chip) for b in BATCHES}}
    fused, reason = _fuse(model, name)
    paths["fused"] = _path(fused, name, batch, unit, chip)
    forwards["fused"] = {b: _forward(fused, b, chip) for b in BATCHES}
    plans = {plan: _planned(plan, fused, name, batch, unit, chip) for plan in _plan_names()} if reason is None else {}
    if "triton" in plans:
        plans[FOLDED] = _folded(fused, name, batch, unit, chip, plans["triton"])
    same = (plan for plan, path in plans.items() if path["block"] == paths["fused"]["block"])
    predicted = [_predicted(fused, b, forwards, chip) for b in BATCHES]
    paths["fused_autocast"] = _path(fused.to(torch.float32), name, batch, unit, chip, autocast=True)
    return {
        "shape": {"tokens": tokens, "width": width, "depth": depth, "input_size": list(size), "unit_bytes": unit},
        **{path: paths[path] for path in PATHS},
        "not_fused": reason,
        "plans": plans,
        "selected_plan": next(same, None),
        "predicted_images_per_s": predicted,
    }


def _plan_names() -> list[str]:
    """The ``PLANS`` of all stems, each once."""
    modules = (importlib.import_module(f"{ops.__name__}.{info.name}") for info in pkgutil.iter_modules(ops.__path__))
    return list(dict.fromkeys(name for module in modules for name in getattr(module, "PLANS", ())))


def _planned(plan: str, fused: nn.Module, *arguments: Any) -> dict[str, Any]:
    with _select.planning(plan):
        return _path(fused, *arguments)


def _folded(fused: nn.Module, name: str, batch: int, unit: int, chip: Chip, triton: dict[str, Any]) -> dict[str, Any]:
    """Plan ``triton`` with other counts for the forward: the folded weights serve no training."""
    from ..fuse import _looks_like_a_block, fuse
    from ..models import FusedBlocks, InnerBlock

    (args, kwargs), _ = _block_arguments(fused, _input(fused, batch), name)
    fuse(fused, inference=True)
    try:
        block = next(m for m in fused.modules() if _looks_like_a_block(m))
        in_sequence = any(isinstance(m, FusedBlocks) and block in m.children() for m in fused.modules())
        told = in_sequence and len(args) == 1 and not kwargs  # NaFlexVit calls each block itself
        with _select.planning("triton"):
            forward = _ledger.count(InnerBlock(block) if told else block, args, kwargs, chip)
            whole = _forward(fused, batch, chip)
    finally:
        fuse(fused)
    found = _forward_counts(forward, whole, unit, chip)
    return triton | found | {part: triton[part] | found[part] for part in ("block", "model")}


def _on_meta(name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return _models.create(name)
    except NotImplementedError:  # something in the constructor needs values
        return _models.create(name).to("meta")


def _images(batch: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(batch, *size, dtype=dtype, device="meta")


def _block_arguments(model: nn.Module, images: Tensor, name: str) -> tuple[tuple[tuple, dict], int]:
    """What the first transformer block is called with, and how many blocks there are."""
    from ..fuse import _looks_like_a_block

    blocks = [m for m in model.modules() if _looks_like_a_block(m)]
    if not blocks:
        raise CommandError(f"{name} has no transformer blocks to count")
    calls: list[tuple[tuple, dict]] = []
    handle = blocks[0].register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        with torch.no_grad():
            model(images)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise CommandError(f"{name} does not run without data: {error}") from error
    finally:
        handle.remove()
    if not calls or calls[0][0][0].dim() != 3:
        raise CommandError(f"the blocks of {name} do not take tokens (B, T, D)")
    return calls[0], sum(type(m) is type(blocks[0]) for m in blocks)


def _fuse(model: nn.Module, name: str) -> tuple[nn.Module, str | None]:
    """The model fused, or as it is with the reason why not."""
    try:
        return _models.fuse(model, name), None
    except CommandError as error:
        return model, str(error)


def _path(model: nn.Module, name: str, batch: int, unit: int, chip: Chip, autocast: bool = False) -> dict[str, Any]:
    """Counts of one block and of the model, forward alone and with backward."""
    from ..fuse import _looks_like_a_block

    arguments, _ = _block_arguments(model, _input(model, batch), name)
    block = next(m for m in model.modules() if _looks_like_a_block(m))
    (x, *rest), kwargs = arguments
    forward = _ledger.count(block, (x, *rest), kwargs, chip, autocast=autocast)
    train = _ledger.count(block, (x.detach().requires_grad_(), *rest), kwargs, chip, train=True, autocast=autocast)
    whole = _forward(model, batch, chip, autocast)
    whole_train = _ledger.count(model, (_input(model, batch),), {}, chip, train=True, autocast=autocast)
    found = _forward_counts(forward, whole, unit, chip)
    found["block"]["backward"] = [_row(o, unit, chip) for o in train.backward]
    found["model"]["training"] = _sums([*whole_train.forward, *whole_train.backward], unit, chip)
    found["model"]["saved_bytes"] = whole_train.saved_bytes
    return found | {
        "backward_units_per_block": _sums(train.backward, unit, chip)["units"],
        "saved_units_per_block": train.saved_bytes / unit,
    }


def _forward_counts(block: Count, model: Count, unit: int, chip: Chip) -> dict[str, Any]:
    sums = _sums(block.forward, unit, chip)
    return {
        "forward_units_per_block": sums["units"],
        "forward_launches_per_block": sums["launches"],
        "forward_floor_us_per_block": sums["floor_us"],
        "block": {"forward": [_row(o, unit, chip) for o in block.forward]},
        "model": {"forward": _sums(model.forward, unit, chip)},
    }


def _input(model: nn.Module, batch: int) -> Tensor:
    return _images(batch, model.default_cfg["input_size"], next(model.parameters()).dtype)


def _forward(model: nn.Module, batch: int, chip: Chip, autocast: bool = False) -> Count:
    return _ledger.count(model, (_input(model, batch),), {}, chip, autocast=autocast)


def _floor_us(operator: Operator, chip: Chip) -> float:
    moved = operator.read_bytes + operator.written_bytes
    return max(operator.flops / chip.tflops * 1e-6, moved / chip.gbs * 1e-3)


def _row(operator: Operator, unit: int, chip: Chip) -> dict[str, Any]:
    return {
        "operator": operator.name,
        "shape": list(operator.shape),
        "kind": operator.kind,
        "ours": operator.ours,
        **_sums([operator], unit, chip),
    }


def _sums(operators: Iterable[Operator], unit: int, chip: Chip) -> dict[str, Any]:
    operators = list(operators)
    return {
        "flops": sum(o.flops for o in operators),
        "read_bytes": sum(o.read_bytes for o in operators),
        "written_bytes": sum(o.written_bytes for o in operators),
        "parameter_bytes": sum(o.parameter_bytes for o in operators),
        "units": sum(o.activation_bytes for o in operators) / unit,
        "launches": len(operators),
        "floor_us": sum(_floor_us(o, chip) for o in operators),
    }


def _predicted(model: nn.Module, batch: int, forwards: dict[str, dict[int, Count]], chip: Chip) -> dict[str, Any]:
    """Images per second of inference."""
    row: dict[str, Any] = {"batch": batch}
    for path, counts in forwards.items():
        device = sum(_device_us(o, chip) for o in counts[batch].forward)
        host = sum(HOST_US_OURS if o.ours else HOST_US for o in counts[batch].forward)
        row[path] = batch / max(device, host) * 1e6
        row[f"{path}_bound"] = "host" if host > device else "device"
    flops = sum(o.flops for o in forwards["eager"][batch].forward)
    logits = batch * max(getattr(model, "num_classes", 0), 0)
    tensors = [*model.parameters(), _input(model, batch)]
    moved = sum(t.numel() * t.element_size() for t in tensors) + 2 * logits
    row["ideal"] = batch / max(flops / chip.tflops * 1e-6, moved / chip.gbs * 1e-3) * 1e6
    return row


def _device_us(operator: Operator, chip: Chip) -> float:
    """At the shares of the rates that kernels reach."""
    flops, moved = chip.attainable
    rate = chip.tflops * flops * ATTAINED_FLOPS.get(operator.kind, 1.0)
    moved_us = (operator.read_bytes + operator.written_bytes) / (chip.gbs * moved * ATTAINED_BYTES) * 1e-3
    return max(operator.flops / rate * 1e-6, moved_us)


def show(document: dict[str, Any]) -> None:
    """Print operators for a single model, sums for all."""
    out, chip = console(), document["chip"]
    if len(document["models"]) == 1:
        (name, model), *_ = document["models"].items()
        for path in ("eager", "fused"):
            for direction in ("forward", "backward"):
                out.print(_operators(model[path]["block"][direction], f"{name}: one block, {path}, {direction}"))
    out.print(_summary(document["models"], document["batch"]), _predictions(document["models"]))
    for model in document["models"].values():
        if model["not_fused"]:
            out.print(model["not_fused"])
    rates = f"{chip['name']}: {chip['tflops']:g} TFLOP/s, {chip['gbs']:g} GB/s ({chip['source']})"
    out.print(
        f"{rates}; batch {document['batch']}, bfloat16\n"
        "one unit is B * T * D * 2 bytes; units leave out weights and their gradients, bytes include them"
    )


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in (*left, *right):
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def _operators(rows: list[dict[str, Any]], title: str) -> Any:
    table = _table(title, ("operator", "result"), ("GFLOP", "MB read", "MB written", "units", "launches", "floor us"))
    for row in rows:
        table.add_row(
            row["operator"] + (" (ours)" if row["ours"] else ""), " x ".join(map(str, row["shape"])), *_numbers([row])
        )
    table.add_section()
    table.add_row("sum", "", *_numbers(rows))
    return table


def _numbers(rows: list[dict[str, Any]]) -> list[str]:
    flops, read, written, units, launches, floor = (
        sum(row[key] for row in rows) for key in ("flops", "read_bytes", "written_bytes", "units", "launches", "floor_us")
    )
    return [f"{flops / 1e9:.1f}", f"{read / 1e6:.1f}", f"{written / 1e6:.1f}", f"{units:.2f}", str(launches), f"{floor:.1f}"]


def _summary(models: dict[str, Any], batch: int) -> Any:
    per_block = ("forward", "backward", "saved", "launches")
    per_image = ("GFLOP", "fwd MB", "train MB", "saved MB", "floor us")
    table = _table("units and launches per block; per image of the model", ("model", "path"), (*per_block, *per_image))
    for name, model in models.items():
        plans = {f"plan {name}": path for name, path in model["plans"].items()}
        for path, found in ({p: model[p] for p in PATHS} | plans).items():
            units = [f"{found[f'{key}_units_per_block']:.2f}" for key in per_block[:3]]
            forward, training = found["model"]["forward"], found["model"]["training"]
            megabytes = [
                (forward["read_bytes"] + forward["written_bytes"]),
                (training["read_bytes"] + training["written_bytes"]),
                found["model"]["saved_bytes"],
            ]
            table.add_row(
                name if path == PATHS[0] else "",
                path.replace("_", " ") + (" (selected)" if path == f"plan {model['selected_plan']}" else ""),
                *units,
                str(found["forward_launches_per_block"]),
                f"{forward['flops'] / batch / 1e9:.2f}",
                *(f"{value / batch / 1e6:.1f}" for value in megabytes),
                f"{forward['floor_us'] / batch:.1f}",
            )
        table.add_section()
    return table


def _predictions(models: dict[str, Any]) -> Any:
    table = _table("predicted images/s, inference", ("model",), ("batch", "eager", "fused", "ideal", "fused / eager"))
    for name, model in models.items():
        for row in model["predicted_images_per_s"]:
            cells = [f"{row[p]:,.0f}" + (" (host)" if row[f"{p}_bound"] == "host" else "") for p in ("eager", "fused")]
            first = name if row["batch"] == BATCHES[0] else ""
            table.add_row(first, str(row["batch"]), *cells, f"{row['ideal']:,.0f}", f"{row['fused'] / row['eager']:.2f}x")
        table.add_section()
    return table
