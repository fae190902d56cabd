"""``python benchmarks/report.py FILE... [--out DIR]``: Markdown tables on standard output, and plots in DIR.

The files are what ``pytest benchmarks/ --benchmark-only --benchmark-json FILE.json`` writes, and ``round.tar`` of
``gpu_round.py``. Losses are in the same tables.
A row whose path is ``reference`` ran PyTorch's operators: it is named so, and is in no plot of kernels.
"""

import argparse
import json
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
GBS_H200, TFLOPS_H200 = 4300.0, 790.0  # measured on an H200 SXM: copy, read and written; bfloat16 GEMM (PERFORMANCE.md)
_COLOURS = {
    "eager": "#8c8c8c",
    "fused": "#1f6fb4",
    "autocast": "#c9a227",
    "compile": "#5b9e5b",
    "max-autotune": "#2d6b3f",
    "naive-attention": "#b4531f",
    "sdpa-flash": "#7a5ba8",
    "sdpa-efficient": "#3aa6a6",
    "sdpa-cudnn": "#c25b8a",
    "sdpa-math": "#4f4f4f",
}
_OTHERS = ("#b4531f", "#7a5ba8", "#3aa6a6", "#c25b8a")


def load(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files; of a case and provider measured twice on one machine, the later."""
    found: dict[tuple, Row] = {}
    for row in (row for path in paths for row in (_of_a_round(path) if path.suffix == ".tar" else _of_benchmarks(path))):
        if "subject" in row and "provider" in row:  # other benchmarks may share the file
            found[machine(row), *_case(row), row["provider"]] = row
    return list(found.values())


def _of_benchmarks(path: Path) -> list[Row]:
    return [benchmark["extra_info"] for benchmark in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]]


def _of_a_round(path: Path) -> list[Row]:
    with tarfile.open(path) as tar:
        file = tar.extractfile("round.json")
        assert file is not None  # no folder
        document = json.load(file)
    # Where the step that asks for the environment was cut, the tables still name the GPU.
    unknown: Row = {"gpus": [], "device": "cuda", "threads": "?", **dict.fromkeys(("torch", "triton", "timm", "commit"))}
    environment = {**unknown, "cpu": document["environment"]["gpu"], **document["environment"]}
    return [{**row, "environment": environment} for step in document["steps"] for row in step["rows"]]


def machine(row: Row) -> str:
    """The GPU, or the processor and its threads, with what the numbers depend on."""
    e = row["environment"]
    gpu = next((g for g in e["gpus"] if e["device"] in ("cuda", g["device"])), None)
    where = f"{gpu['name']}, driver {gpu['driver'] or 'unknown'}" if gpu else f"{e['cpu']}, {e['threads']} threads"
    software = ", ".join(f"{name} {e[name]}" for name in ("torch", "triton", "timm", "commit") if e[name])
    return f"{where}; {software}"


def provider_name(row: Row) -> str:
    """The provider, with the path where it is not what the name promises."""
    return row["provider"] if row["path"] in ("pytorch", "kernel", row["provider"]) else f"{row['provider']} ({row['path']})"


def is_kernel(row: Row) -> bool:
    """Whether the row may be shown beside a kernel's floor: measured on a GPU, and not our reference."""
    return row["environment"]["device"] != "cpu" and row["path"] != "reference"


class Rates(NamedTuple):
    """What the chip reaches: 10^9 bytes/s of a copy, 10^12 FLOP/s of a bfloat16 GEMM."""

    gbs: float = GBS_H200
    tflops: float = TFLOPS_H200

    def __str__(self) -> str:
        return f"{self.gbs:,g} GB/s and {self.tflops:,g} TFLOP/s"


def floor_share(row: Row, rates: Rates) -> float | None:
    """The least time that the bytes and the FLOPs (of rows that have them) need, divided by the measured time."""
    if not is_kernel(row):
        return None
    floor_us = max(row["bytes"] / rates.gbs * 1e-3, row.get("flops", 0) / rates.tflops * 1e-6)
    return floor_us / row["device_us"]


def ideal(row: Row) -> float | None:
    """Images per second at the roofline of the GPU; None in training, on a CPU, and in files from before it was recorded."""
    return row.get("ideal_images_per_s")


def _case(row: Row) -> tuple:
    return row["subject"], row["workload"], row["mode"], row["batch"], row["dtype"]


def _models(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["subject"] == "model"]


def _kernels(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["subject"] != "model"]


def markdown(rows: list[Row], rates: Rates) -> str:
    """One section per machine, one table for models and one for operators."""
    parts = []
    for name in dict.fromkeys(map(machine, rows)):
        mine = [row for row in rows if machine(row) == name]
        parts.append(f"## {name}")
        if _models(mine):
            parts += ["### Models", _table(_models(mine), _model_columns(_models(mine)))]
        if _kernels(mine):
            parts += ["### Operators", _table(_kernels(mine), _kernel_columns(rates))]
        parts.append(_notes(mine, rates))
    return "\n\n".join(parts) + "\n"


Columns = dict[str, Callable[[Row], str]]


def _shared_columns() -> Columns:
    return {
        "workload": lambda r: r["workload"],
        "mode": lambda r: r["mode"],
        "batch": lambda r: str(r["batch"]),
        "dtype": lambda r: r["dtype"],
        "provider": provider_name,
    }


def _model_columns(rows: list[Row]) -> Columns:
    roofline: Columns = {"of roofline": _of_roofline} if any(map(ideal, rows)) else {}
    return {
        **_shared_columns(),
        "images/s": lambda r: _number(r["images_per_s"]),
        "p10 - p90": lambda r: f"{_number(r['images_per_s_p10'])} - {_number(r['images_per_s_p90'])}",
        **roofline,
        "device ms": lambda r: _number(r["device_us"] and r["device_us"] / 1000),
        "wall ms": lambda r: _number(r["wall_us"] / 1000),
        "vs eager": _ratio,
        "peak MiB": lambda r: _number(r["peak_mem_bytes"] and r["peak_mem_bytes"] / 2**20),
    }


def _kernel_columns(rates: Rates) -> Columns:
    return {
        "operator": lambda r: r["subject"],
        **_shared_columns(),
        "us": lambda r: _number(r["ms"] * 1000),
        "p10 - p90": lambda r: " - ".join(_number(r[f"{_clock(r)}_us_{p}"]) for p in ("p10", "p90")),
        "wall us": lambda r: _number(r["wall_us"]),
        "GB/s": lambda r: _number(None if r["path"] == "reference" else r["gb_per_s"]),
        "of floor": lambda r: "-" if (share := floor_share(r, rates)) is None else f"{share:.0%}",
        "vs eager": _ratio,
    }


def _of_roofline(row: Row) -> str:
    limit = ideal(row)
    if limit is None:
        return "-"
    share = row["images_per_s"] / limit
    return f"{share:.0%} of {_number(limit)}" if share >= 0.1 else f"{share:.1%} of {_number(limit)}"  # 1 image: not 0%


def _clock(row: Row) -> str:
    return "wall" if row["device_us"] is None else "device"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(row: Row) -> str:
    return f"{row['ratio_to_eager']:.2f}x ({row['ratio_to_eager_p10']:.2f} - {row['ratio_to_eager_p90']:.2f})"


def _table(rows: list[Row], columns: Columns) -> str:
    first = list(dict.fromkeys(map(_case, rows)))
    rows = sorted(rows, key=lambda row: first.index(_case(row)))  # stable: providers stay as measured
    text = {"workload", "mode", "dtype", "provider", "operator"}
    lines = [list(columns), ["---" if name in text else "---:" for name in columns]]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _notes(rows: list[Row], rates: Rates) -> str:
    fewest, most = (f(row["rounds"] for row in rows) for f in (min, max))
    rounds = str(most) if fewest == most else f"{fewest} to {most}"
    notes = [
        f"Interleaved rounds ({rounds}), median, p10 and p90; vs eager: the median over rounds of eager's time "
        "divided by the provider's, above 1 is faster. Every row passed the correctness budget at its shape."
    ]
    if any(row["path"] == "reference" for row in rows):
        notes.append("`fused (reference)`: PyTorch's operators through vitkernels' interface. No kernel ran.")
    if any(map(ideal, rows)):
        notes.append(
            "Roofline: images/s with matrix products at the chip's datasheet rate and nothing moved but images, weights and "
            "logits, whichever takes longer (`vitkernels roofline`). Inference only."
        )
    if any(is_kernel(row) for row in _kernels(rows)):
        notes.append(
            f"Floor: the time of what the operator must move and compute at {rates} (`--gbs`, `--tflops`), beside device time."
        )
    return "\n".join(notes)


def plots(rows: list[Row], rates: Rates) -> dict[str, Any]:
    """Figures by file name. Kernels have one only where kernels ran."""
    found = {}
    names = list(dict.fromkeys(map(machine, rows)))
    for index, name in enumerate(names):
        mine = [row for row in rows if machine(row) == name]
        suffix = f"-{index + 1}" if len(names) > 1 else ""
        for mode in ("infer", "train"):
            models = [row for row in _models(mine) if row["mode"] == mode]
            if models:
                words = f"timm models, {'inference' if mode == 'infer' else 'training step'}, {models[0]['dtype']}"
                panels = {"images per second (logarithmic)": "images_per_s", "speed relative to eager": "ratio_to_eager"}
                found[f"models-{mode}{suffix}.png"] = _bars(models, panels, f"{words}\n{name}")
        for operator in dict.fromkeys(row["subject"] for row in _kernels(mine)):
            kernels = [row for row in _kernels(mine) if row["subject"] == operator and is_kernel(row)]
            if any(row["path"] == "kernel" for row in kernels):
                panels = {
                    "microseconds (logarithmic)": "us",
                    "GB/s": "gb_per_s",
                    f"share of the floor at\n{rates}": "floor",
                }
                shown = [{**r, "us": r["device_us"], "floor": floor_share(r, rates)} for r in kernels]
                for row in shown:
                    row |= {"us_p10": row["device_us_p10"], "us_p90": row["device_us_p90"]}
                found[f"{operator}{suffix}.png"] = _bars(shown, panels, f"{operator}, {kernels[0]['dtype']}\n{name}")
    return found


def _bars(rows: list[Row], panels: dict[str, str], title: str) -> Any:
    """Horizontal bars, one group per case and one panel per quantity, with p10 and p90 where the row has them."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(map(_case, rows)))
    providers = list(dict.fromkeys(map(provider_name, rows)))
    pitch = len(providers) + 1
    figure = Figure(figsize=(2 + 4.5 * len(panels), 1.9 + 0.25 * len(cases) * pitch), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (label, key) in zip(axes, panels.items(), strict=True):
        for position, provider in enumerate(providers):
            mine = [row for row in rows if provider_name(row) == provider]
            heights = [cases.index(_case(row)) * pitch + position for row in mine]
            style = {"color": _colour(provider, position), "label": provider}
            _draw(panel, mine, heights, key, "logarithmic" in label, style)
        if key == "images_per_s":
            _draw_rooflines(panel, rows, cases, pitch)
        _dress(panel, rows, label, key)
    axes[0].set_yticks([i * pitch + (pitch - 2) / 2 for i in range(len(cases))], [_case_label(case) for case in cases])
    axes[0].set_ylim(len(cases) * pitch - 1, -1)  # the first case on top
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), frameon=False)
    figure.suptitle(f"{title}\nmedian, lines from p10 to p90", fontsize=10)
    return figure


def _colour(provider: str, position: int) -> str:
    return _COLOURS.get(provider.partition(" ")[0], _OTHERS[position % len(_OTHERS)])


def _case_label(case: tuple) -> str:
    subject, workload, mode, batch, _ = case
    return f"{workload}\nbatch {batch}" + ("" if subject == "model" else f", {mode}")


def _draw(panel: Any, rows: list[Row], heights: list[int], key: str, log: bool, style: dict[str, str]) -> None:
    """Bars from zero; points on a logarithmic axis, which has no zero."""
    values = [row[key] for row in rows]
    spread = None
    if f"{key}_p10" in rows[0]:
        spread = [[max(0, r[key] - r[f"{key}_p10"]) for r in rows], [max(0, r[f"{key}_p90"] - r[key]) for r in rows]]
    lines = {"elinewidth": 1, "ecolor": "#333333"}
    if log:
        panel.errorbar(values, heights, xerr=spread, fmt="o", markersize=7, **lines, **style)
    else:
        panel.barh(heights, values, height=0.9, xerr=spread, error_kw=lines, **style)
    for height, row, value in zip(heights, rows, values, strict=True):
        text = f"{value:.2f}x" if key == "ratio_to_eager" else f"{value:.0%}" if key == "floor" else _number(value)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        at = (min(row.get(f"{key}_p90", value), 1.5 * value), height)  # beside the line, unless that is far away
        panel.annotate(text, at, (5, 0), textcoords="offset points", va="center", fontsize=8, bbox=paper)


def _draw_rooflines(panel: Any, rows: list[Row], cases: list[tuple], pitch: int) -> None:
    """A dashed line across each case of which the roofline is known."""
    limits = {_case(row): limit for row in rows if (limit := ideal(row))}
    if limits:
        starts = [cases.index(case) * pitch - 0.6 for case in limits]
        ends = [start + pitch - 0.8 for start in starts]
        style = {"colors": "#c0392b", "linestyles": "--", "linewidth": 1.5, "label": "roofline"}
        panel.vlines(list(limits.values()), starts, ends, **style)
        for start, limit in zip(starts, limits.values(), strict=True):
            panel.annotate(
                _number(limit), (limit, start), (4, -2), textcoords="offset points", va="top", fontsize=8, color="#c0392b"
            )


def _dress(panel: Any, rows: list[Row], label: str, key: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    medians = [row[key] for row in rows]
    if key == "images_per_s":
        medians += [limit for row in rows if (limit := ideal(row))]  # the axis must reach it
    if "logarithmic" in label:
        panel.set_xscale("log")
        p10 = f"{key}_p10"
        panel.set_xlim(0.5 * min(row[p10] if p10 in row else row[key] for row in rows), 4 * max(medians))
        low, high = panel.get_xlim()
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,), numticks=12))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        panel.set_xlim(0, 1.35 * max(medians))  # one disturbed round must not squeeze the bars
    if key == "floor":
        panel.xaxis.set_major_formatter(PercentFormatter(1))
    if key in ("ratio_to_eager", "floor"):
        panel.axvline(1, color="#333333", linewidth=1, linestyle=":")
    panel.grid(axis="x", color="#e0e0e0")
    panel.set_axisbelow(True)
    panel.set_xlabel(label)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(axis="y", length=0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the plots there")
    gbs = f"the chip's measured copy bandwidth, the floor of operators (default: {GBS_H200:,g}, an H200)"
    tflops = f"its measured dense bfloat16 rate (default: {TFLOPS_H200:g}, an H200)"
    parser.add_argument("--tflops", type=float, default=TFLOPS_H200, help=tflops)
    parser.add_argument("--gbs", type=float, default=GBS_H200, help=gbs)
    args = parser.parse_args(arguments)
    rows = load(args.files)
    if not rows:
        print("no benchmark rows in these files", file=sys.stderr)
        return 1
    rates = Rates(args.gbs, args.tflops)
    print(markdown(rows, rates))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, figure in plots(rows, rates).items():
            figure.savefig(args.out / name, dpi=130)
            print(f"![{name}]({name})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
