"""``vitkernels bench``: whole models, fused against eager, side by side in one process."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _environment, _floor, _measure, _models, _photos
from ._output import console, picture_path, progress, save_picture
from ._providers import Provider, providers

_DESCRIPTION = """
Measure whole timm models: eager, eager under autocast, fused and, with --compile, torch.compile. All share one set of random
weights and one batch of photographs. Rounds are interleaved, and the ratio is the median over rounds of eager's time divided
by the provider's. A fused model is timed only after its output matched eager's at that very shape. "of floor", on GPUs that
``vitkernels roofline`` knows and in 16 bit: the time of the stock model's operators at the chip's rates, divided by the
measured time.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register the command."""
    parser = subparsers.add_parser(
        "bench", help="images per second of fused models against eager", description=_DESCRIPTION, allow_abbrev=False
    )
    names = f"timm names or sizes ({', '.join(_models.SIZES)}), comma-separated (default: tiny,small)"
    parser.add_argument("--models", type=_models.listed(str), default=["tiny", "small"], metavar="A,B", help=names)
    batches = "batch sizes, comma-separated (default: 1,8)"
    parser.add_argument("--batch-sizes", type=_models.listed(_models.positive), default=[1, 8], metavar="A,B", help=batches)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=_models.DTYPES, default="float32", help="of weights and input (default: float32)")
    parser.add_argument("--mode", choices=("infer", "train"), default="infer", help="train: forward and backward")
    rounds = "measure exactly this many rounds (default: 20, fewer where a row would take longer than 4 s)"
    parser.add_argument("--rounds", type=_models.positive, help=rounds)
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile of the timm model")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the result")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every model at every batch size. A case that fails is named under ``errors`` and has no rows."""
    _measure.keep_freed_memory()
    device = _models.pick_device(args.device)
    plot = picture_path(args.plot, "--plot") if args.plot else None
    names = list(dict.fromkeys(_models.check_name(name) for name in args.models))
    rounds = args.rounds or _measure.DEFAULT_ROUNDS
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    with progress() as bar:
        task = bar.add_task("", total=len(names) * len(args.batch_sizes) * rounds)
        for case, (contestants, oracle, name, batch) in enumerate(_cases(names, device, args)):
            bar.update(task, completed=case * rounds, description=f"{name}, batch {batch}")
            images, source = _photos.sample_batch(_data_config(oracle), batch)
            try:
                measured = _measured(contestants, oracle, images.to(device), args, lambda: bar.advance(task))
                floor_ms = _floor_ms(
                    name, batch, device, args.mode, args.dtype
                )  # after the measurement, which it must not disturb
                rows += [{"model": name, "batch": batch, **row, **_share(floor_ms, row["ms"])} for row in measured]
            except torch.OutOfMemoryError:
                errors.append(f"{name}, batch {batch}: out of GPU memory")
            except _Failed as failure:
                errors.append(f"{name}, batch {batch}: {failure}")
    environment = {**_environment.environment(), "device": str(device), "input": source, "weights": "random"}
    document: dict[str, Any] = {"environment": environment, "rows": rows}
    if errors:
        document["errors"] = errors
    if plot and rows:
        from ._plot import bench_figure

        save_picture(bench_figure(document), plot)
    return document


class _Failed(Exception):
    """A case whose numbers must not be shown."""


def _cases(
    names: list[str], device: torch.device, args: argparse.Namespace
) -> Iterator[tuple[list[Provider], Provider, str, int]]:
    """Each model's providers with each batch size; one model in memory at a time."""
    for name in names:
        contestants, oracle = providers(name, device, getattr(torch, args.dtype), args.mode, args.compile)
        for batch in args.batch_sizes:
            yield contestants, oracle, name, batch


def _floor_ms(name: str, batch: int, device: torch.device, mode: str, dtype: str) -> float | None:
    """The roofline of the stock model's inference in 16 bit; None on a CPU or an unknown GPU, in training and in float32."""
    chip = _floor.chip_of(device) if mode == "infer" and dtype != "float32" else None
    found = _floor.inference(name, batch, chip) if chip else None
    return found["floor_ms"] if found else None


def _share(floor_ms: float | None, ms: float) -> dict[str, float | None]:
    return {"floor_ms": floor_ms, "share_of_floor": floor_ms / ms if floor_ms else None}


def _data_config(provider: Provider) -> dict[str, Any]:
    from timm.data import resolve_data_config

    return resolve_data_config({}, model=provider.model)


def _measured(
    contestants: list[Provider], oracle: Provider, images: Tensor, args: argparse.Namespace, tick: Callable[[], object]
) -> list[dict[str, Any]]:
    """One row per provider, after all were checked; ``tick`` is called after each round."""
    batch, device, eager = len(images), images.device, contestants[0]
    images = images.to(eager.dtype)  # rounded once, so that float32 providers see the same values
    labels = torch.randint(oracle.model.num_classes, (batch,), generator=torch.Generator().manual_seed(0)).to(device)
    arguments = (images, labels, args.mode)
    differences = _checked(contestants, oracle, arguments)
    steps = {p.name: p.step(*arguments) for p in contestants}
    times = []
    for seconds_per_call in _measure.interleaved(steps, device, args.rounds):
        times.append(seconds_per_call)
        tick()
    models = [p.model for p in contestants]
    rows = []
    for p in contestants:
        seconds, eager_seconds = ([t[name] for t in times] for name in (p.name, "eager"))
        row = {"provider": p.name, "mode": args.mode, "dtype": args.dtype, "path": p.path}
        row |= _measure.statistics(seconds, eager_seconds, batch)
        peak = _measure.peak_memory(steps[p.name], p.model, models, device)
        rows.append({**row, **differences[p.name], "peak_mem_bytes": peak})
    return rows


def _checked(
    contestants: list[Provider], oracle: Provider, arguments: _measure.Arguments
) -> dict[str, dict[str, float | None]]:
    """Each provider's differences to eager; raises when the fused model's are too large, or when one does not run at all."""
    eager = contestants[0]
    base = _first_run(eager, arguments)
    truth = base if eager.dtype == torch.float32 else _first_run(oracle, arguments)
    found = {}
    for provider in contestants:
        mine = base if provider is eager else _first_run(provider, arguments)
        found[provider.name], wrong = _measure.compare(mine, base, truth, eager.dtype)
        if wrong and provider.name == "fused":
            raise _Failed(f"the fused model does not match eager: {wrong}")
    return found


def _first_run(provider: Provider, arguments: _measure.Arguments) -> list[Tensor]:
    try:
        return _measure.outputs(provider, arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch.compile without a compiler, a kernel that does not launch: many types, one meaning
        raise _Failed(f"{provider.name} failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from error


def show(document: dict[str, Any]) -> None:
    """Print the rows, and what they depend on."""
    from rich.table import Table

    rows, out = document["rows"], console()
    if rows:
        title = f"{rows[0]['mode']}, {rows[0]['dtype']} on {document['environment']['device']}"
        floors = any(row["share_of_floor"] is not None for row in rows)
        right = ("images/s", "p10 - p90", "ms/batch", *(["of floor"] if floors else []), "vs eager", "max diff", "peak mem")
        table = Table(title=title, title_justify="left")
        for column in ("model", "batch", "provider", "path", *right):
            table.add_column(column, justify="right" if column in ("batch", *right) else "left", no_wrap=True)
        for before, row in zip([None, *rows], rows, strict=False):
            if before and (before["model"], before["batch"]) != (row["model"], row["batch"]):
                table.add_section()
            table.add_row(*_cells(row, floors))
        out.print(table)
        out.print(_footer(document["environment"], rows))
        if floors:
            out.print("floor: timm's operators in 16 bit, without autocast, at datasheet rates; a fused model moves less")


def _cells(row: dict[str, Any], floors: bool) -> Iterator[str]:
    yield from (row["model"], str(row["batch"]), row["provider"], row["path"])
    yield f"{row['images_per_s']:.1f}"
    yield f"{row['images_per_s_p10']:.1f} - {row['images_per_s_p90']:.1f}"
    yield f"{row['ms']:.2f}"
    if floors:
        yield "-" if row["share_of_floor"] is None else f"{row['share_of_floor']:.1%}"
    yield f"{row['ratio_to_eager']:.2f}x"
    yield "not finite" if row["max_abs_diff"] is None else f"{row['max_abs_diff']:.1e}"
    yield "-" if row["peak_mem_bytes"] is None else f"{row['peak_mem_bytes'] / 2**20:.0f} MiB"


def _footer(environment: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    gpu = next((g for g in environment["gpus"] if environment["device"] in ("cuda", g["device"])), None)
    if gpu:
        machine = f"{gpu['name']}, driver {gpu['driver'] or 'unknown'}"
    else:
        machine = f"{environment['cpu']}, {environment['threads']} threads"
    fewest, most = (f(row["rounds"] for row in rows) for f in (min, max))
    names = ("torch", "triton", "timm", "python", "vitkernels", "commit")
    software = ", ".join(f"{n} {environment[n]}" for n in names if environment[n])
    rounds = f"{most} rounds" if fewest == most else f"{fewest} to {most} rounds"
    return f"{machine}; input: {environment['input']}, weights: random; {rounds}\n{software}"
