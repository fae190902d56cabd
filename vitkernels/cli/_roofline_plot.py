"""The picture of ``vitkernels roofline``: one line of panels per model."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

_KINDS = {"matrix products": "#1f6fb4", "attention": "#5b9e5b", "LayerNorm": "#c9a227", "elementwise": "#8c8c8c"}
_LABELS = {"elementwise": "elementwise, sums, copies"}
_PATHS = {"autocast": "autocast", "fused_autocast": "fused,\nautocast", "eager": "eager", "fused": "fused"}
_LINES = {"ideal": ("#333333", ":"), "fused": ("#1f6fb4", "-"), "eager": ("#8c8c8c", "--")}


def figure(document: dict[str, Any]) -> Figure:
    """Units per block by kind of operator, forward and backward, and predicted images per second over the batch."""
    models, chip = document["models"], document["chip"]
    picture = Figure(figsize=(12, 1.3 + 2.6 * len(models)), layout="constrained")
    grid = picture.subplots(len(models), 3, squeeze=False, width_ratios=(1, 1, 1))
    for row, (name, model) in zip(grid, models.items(), strict=True):
        for axes, direction in zip(row, ("forward", "backward"), strict=False):
            _units(axes, model, direction)
            axes.set_title(f"{name}, one block, {direction}", fontsize=9)
        _speeds(row[2], model["predicted_images_per_s"])
        row[2].set_title(f"{name}, inference", fontsize=9)
    for axes in grid.flat:
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    bars, lines = grid[0, 0].get_legend_handles_labels(), grid[0, 2].get_legend_handles_labels()
    picture.legend(bars[0] + lines[0], bars[1] + lines[1], loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    picture.suptitle(f"Counted from shapes; {chip['name']}: {chip['tflops']:g} TFLOP/s, {chip['gbs']:g} GB/s", fontsize=11)
    return picture


def _units(axes: Axes, model: dict[str, Any], direction: str) -> None:
    ends = [0.0] * len(_PATHS)
    for kind, colour in _KINDS.items():
        rows = (model[path]["block"][direction] for path in _PATHS)
        widths = [sum(r["units"] for r in block if r["kind"] == kind) for block in rows]
        axes.barh(list(_PATHS.values()), widths, left=ends, color=colour, label=_LABELS.get(kind, kind), height=0.7)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for position, end in enumerate(ends):
        axes.annotate(f"{end:.1f}", (end, position), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.15 * max(ends))
    axes.invert_yaxis()
    axes.set_xlabel("units (B * T * D * 2 bytes)", fontsize=8)
    axes.grid(axis="x", color="#e0e0e0")


def _speeds(axes: Axes, rows: list[dict[str, Any]]) -> None:
    batches = [row["batch"] for row in rows]
    for path, (colour, style) in _LINES.items():
        values = [row[path] for row in rows]
        label = "ideal" if path == "ideal" else f"{path}, predicted"
        axes.plot(batches, values, style, color=colour, marker="o", markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("batch", fontsize=8)
    axes.set_ylabel("images / s", fontsize=8)
    axes.grid(color="#e0e0e0")
