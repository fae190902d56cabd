"""Pictures of measurements. Draws on figures of its own, so no display and no global matplotlib state is touched."""

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .._text import encodable

_COLOURS = {"eager": "#8c8c8c", "autocast": "#c9a227", "fused": "#1f6fb4", "compile": "#5b9e5b"}
_BAR = 0.28  # inches


def bench_figure(document: dict[str, Any]) -> Figure:
    """Images per second (points, logarithmic) and ratio to eager (bars) of every row, with their p10 and p90."""
    rows = document["rows"]
    cases = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    pitch = len(providers) + 1
    figure = Figure(figsize=(11, 1.9 + _BAR * len(cases) * pitch), layout="constrained")
    speed, ratio = figure.subplots(1, 2, sharey=True)
    ratio.axvline(1, color="#333333", linewidth=1, linestyle=":", zorder=0)
    for position, provider in enumerate(providers):
        mine = [row for row in rows if row["provider"] == provider]
        heights = [cases.index((r["model"], r["batch"])) * pitch + position for r in mine]
        label = provider + (f" ({', '.join(sorted({r['path'] for r in mine}))})" if provider == "fused" else "")
        style = {"color": _COLOURS[provider], "label": label}
        whiskers = {"xerr": _spread(mine, "images_per_s"), "ecolor": "#333333", "elinewidth": 1, "capsize": 2}
        speed.errorbar([r["images_per_s"] for r in mine], heights, fmt="o", markersize=7, **whiskers, **style)
        whiskers = {"elinewidth": 1, "capsize": 2, "ecolor": "#333333"}
        spread = _spread(mine, "ratio_to_eager")
        ratio.barh(heights, [r["ratio_to_eager"] for r in mine], xerr=spread, height=0.9, error_kw=whiskers, **style)
        for height, row in zip(heights, mine, strict=True):
            _write(speed, row, "images_per_s", height, f"{row['images_per_s']:,.{0 if row['images_per_s'] >= 100 else 1}f}")
            _write(ratio, row, "ratio_to_eager", height, f"{row['ratio_to_eager']:.2f}x")
    speed.set_yticks([i * pitch + (pitch - 2) / 2 for i in range(len(cases))])
    speed.set_yticklabels([f"{model}\nbatch {batch}" for model, batch in cases])
    speed.invert_yaxis()
    speed.set_xscale("log")
    speed.set_xlim(0.7 * min(r["images_per_s_p10"] for r in rows), 2 * max(r["images_per_s_p90"] for r in rows))
    speed.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    speed.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    speed.xaxis.set_minor_formatter(NullFormatter())
    speed.grid(axis="x", color="#e0e0e0")
    speed.set_xlabel("images per second (logarithmic)")
    median, whisker = (max(r[key] for r in rows) for key in ("ratio_to_eager", "ratio_to_eager_p90"))
    ratio.set_xlim(0, 1.2 * min(whisker, 1.5 * median))  # one disturbed round must not squeeze the bars
    ratio.set_xlabel("speed relative to eager (higher is faster)")
    for axes in (speed, ratio):
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.legend(*ratio.get_legend_handles_labels(), loc="outside lower center", ncols=len(providers), frameon=False)
    figure.suptitle(_title(document), fontsize=11)
    return figure


def _write(axes: Axes, row: dict[str, Any], key: str, height: float, text: str) -> None:
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    at = (min(row[f"{key}_p90"], 1.5 * row[key]), height)  # beside the whisker, unless that is far away
    axes.annotate(text, at, (7, 0), textcoords="offset points", va="center", fontsize=8, bbox=paper)


def _spread(rows: list[dict[str, Any]], key: str) -> list[list[float]]:
    """Distances from the median down to p10 and up to p90."""
    return [[r[key] - r[f"{key}_p10"] for r in rows], [r[f"{key}_p90"] - r[key] for r in rows]]


def _title(document: dict[str, Any]) -> str:
    environment, row = document["environment"], document["rows"][0]
    gpu = next((g["name"] for g in environment["gpus"] if environment["device"] in ("cuda", g["device"])), None)
    machine = gpu or f"{environment['cpu']}, {environment['threads']} threads"
    mode = "training step" if row["mode"] == "train" else "inference"
    return f"timm models, {mode}, {row['dtype']}: {machine}, torch {environment['torch']}\nmedian, bars from p10 to p90"


def attention_figure(rows: list[dict[str, Any]]) -> Figure:
    """One row per photo: what the model saw, attention rollout, and the last layer's attention over the greyed photo.

    Each of ``rows`` has ``name`` and ``caption``, ``photo`` (H, W, 3) in 0..1, ``rollout`` and ``last`` (Gh, Gw) that sum to 1,
    and ``query``, the words for whose attention that is. Colours span each map; its range is in its title.
    """
    figure = Figure(figsize=(9.6, 0.1 + 3.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        height, width = row["photo"].shape[:2]
        extent = (0, width, height, 0)
        axes[0].imshow(row["photo"], extent=extent)
        words = (textwrap.shorten(encodable(row[key], "utf-8"), 44, placeholder="...") for key in ("name", "caption"))
        axes[0].set_title("\n".join(words), fontsize=9, parse_math=False)  # a file may be named a$x_$b.jpg, in any encoding
        grey = row["photo"].mean(-1)
        for panel, kind, name in ((axes[1], "rollout", "attention rollout"), (axes[2], "last", "last layer")):
            heat = row[kind] * row[kind].size  # 1: what every patch would get from uniform attention
            panel.imshow(grey, extent=extent, cmap="gray", vmin=0, vmax=1)
            shown = panel.imshow(heat, extent=extent, cmap="inferno", alpha=0.55, interpolation="bilinear")
            scale = f"patches get {heat.min():.2g} to {heat.max():.2g} times the mean"
            panel.set_title(f"{name}\n{row['query']}\n{scale}", fontsize=9)
        for panel in axes:
            panel.set_axis_off()
    bar = figure.colorbar(shown, ax=grid[:, 2], shrink=0.9 / len(rows), aspect=20)
    if bar.solids is not None:
        bar.solids.set_alpha(1)
    bar.set_ticks(shown.get_clim(), labels=["least", "most"])
    return figure
