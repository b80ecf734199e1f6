"""The figures of report.html: SVG elements in the page's own ink and font, told apart by marker and line style too."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from itertools import groupby
from typing import Any

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from cbtm_ray.evaluate.result_rows import ORACLE, PrefixRow, ResultRow
from cbtm_ray.manifests import CurvePoint

PALETTE = ("#3d7fd6", "#d2691e", "#2a9a6c", "#c4457f", "#8b66d0", "#a88500", "#1497ac", "#cf4d40", "#6c8f2b", "#8f7063")
MARKERS = "os^DvPX<>*h"
LINES = ("-", "--", "-.", ":")
MAX_CURVE_LABELS = 17
_INK, _CARD = "#010203", "#fdfcfb"
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "text.color": _INK,
    "xtick.color": _INK, "ytick.color": _INK, "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "grid.color": _INK, "grid.alpha": 0.15, "lines.linewidth": 1.8,
}  # fmt: skip


def plot(name: str, label: str, draw: Callable[[Axes], None]) -> Markup:
    """A figure as an SVG element of the page, in the page's ink; `label` is what a screen reader says."""
    with matplotlib.style.context(["default", _STYLE | {"svg.hashsalt": name}]):
        figure = Figure(figsize=(4.4, 3.3), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    head, body = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL).split("<defs>", 1)
    view_box = re.search(r'viewBox="([^"]+)"', head)
    assert view_box, "matplotlib writes a viewBox"
    body = re.sub(r"<style.*?</style>", "", "<defs>" + body, flags=re.DOTALL).replace("xlink:href", "href")
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace(_INK, "currentColor").replace(_CARD, "var(--card)")
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(view_box[1], label) + Markup(body)


def _look(i: int) -> dict[str, Any]:
    """Color, marker and line style of series or cluster i."""
    return {"color": PALETTE[i % 10], "marker": MARKERS[i % 10], "ls": LINES[i % 4]}


def _label_ends(axes: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Write (y, text, color) beside the right edge, moved apart where they would touch."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = -math.inf
    for y, text, color in sorted(label for label in labels if math.isfinite(label[0])):
        placed = max(to_axes.transform((1, y))[1], placed + 0.062)
        axes.text(1.02, placed, text, color=color, transform=axes.transAxes, va="center", fontsize=9)


def draw_results(axes: Axes, results: list[ResultRow]) -> None:
    """Perplexity against top-k: a line per system and routing, a band for each model that does not route."""

    def series(row: ResultRow) -> str:
        return str(row["routing"]) if row["system"] == "cbtm" else f"{row['system']}, {row['routing']}"

    labels = []
    results = [row for row in results if math.isfinite(row["ppl_high"])]
    flat = [row for row in results if row["routing"] is None]
    routed = sorted((row for row in results if row["routing"] is not None), key=series)
    for i, (name, group) in enumerate(groupby(routed, key=series)):
        rows = sorted(group, key=lambda row: row["top_k"])
        ppl, low, high = (np.array([row[key] for row in rows]) for key in ("ppl", "ppl_low", "ppl_high"))
        k = np.array([row["top_k"] for row in rows]) * 2 ** (0.06 * (i % 3 - 1))
        axes.errorbar(k, ppl, np.maximum(0, (ppl - low, high - ppl)), **_look(i), capsize=3)
        labels.append((ppl[-1], name, PALETTE[i % 10]))
    for i, row in enumerate(flat):
        axes.axhline(row["ppl"], color=_INK, ls=LINES[i % 4], lw=1.2)
        axes.axhspan(row["ppl_low"], row["ppl_high"], color=_INK, alpha=0.13, lw=0)
        labels.append((row["ppl"], row["system"], _INK))
    _perplexity_axes(axes, "experts mixed per token (top-k)", sorted({row["top_k"] for row in routed}))
    _label_ends(axes, labels)


def draw_prefixes(axes: Axes, rows: list[PrefixRow]) -> None:
    """Ratio to the dense control against the length of the prefix: a line for each routing of one expert, held after it."""
    labels = []
    shown = [row for row in rows if row["top_k"] == 1 and (row["held"] or row["routing"] == ORACLE)]
    for i, (name, group) in enumerate(
        groupby(sorted(shown, key=lambda row: row["routing"]), lambda row: row["routing"])
    ):
        points = sorted(group, key=lambda row: row["prefix_tokens"])
        ratio, low, high = (
            np.array([row[key] for row in points]) for key in ("ratio_to_dense", "ratio_low", "ratio_high")
        )
        n = np.array([row["prefix_tokens"] for row in points]) * 2 ** (0.09 * (i % 5 - 2))
        axes.errorbar(n, ratio, np.maximum(0, (ratio - low, high - ratio)), **_look(i), capsize=2, elinewidth=1)
        labels.append((ratio[-1], name, PALETTE[i % 10]))
    ticks = sorted({row["prefix_tokens"] for row in shown})
    axes.set(xscale="log", xlabel="tokens that routing has seen", ylabel="perplexity / dense control's")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")
    _label_ends(axes, labels)


def _perplexity_axes(axes: Axes, xlabel: str, ticks: list[int]) -> None:
    """Logarithmic axes of perplexity against whole numbers, which are the ticks."""
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="perplexity")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(axis="y")


def draw_sweep(axes: Axes, series: dict[str, list[tuple[int, float]]]) -> None:
    """Perplexity against the number of clusters: a line for each top-k, and the dense controls in the page's ink."""
    labels, ticks = [], sorted({k for points in series.values() for k, _ in points})
    for i, (name, points) in enumerate(series.items()):
        k, ppl = zip(*points, strict=True)
        look = _look(i) if name != "dense" else {"color": _INK, "ls": "-", "marker": "|"}
        axes.plot(k, ppl, **look)
        labels.append((ppl[-1], name, str(look["color"])))
    _perplexity_axes(axes, "clusters = experts", ticks)
    _label_ends(axes, labels)


def draw_curves(axes: Axes, curves: dict[str, list[CurvePoint]]) -> None:
    """Loss over each model's own budget, so that experts (total/K tokens) and the dense control end together."""
    labels, few = [], len(curves) <= MAX_CURVE_LABELS
    for name, points in sorted(curves.items()):
        expert = int(name.split()[-1]) if name.startswith("expert ") else None
        share = [100 * point["tokens"] / points[-1]["tokens"] for point in points]
        loss = [point["loss_nats"] for point in points]
        if expert is None:
            axes.plot(share, loss, color=_INK, lw=2.4)
        else:
            axes.plot(share, loss, lw=1.2, ms=4 if few else 0, markevery=max(1, len(loss) // 6), **_look(expert))
        if expert is None:
            labels.append((loss[-1], name, _INK))
        elif few:
            labels.append((loss[-1], str(expert), PALETTE[expert % 10]))
    axes.set(xlabel="share of the model's own training tokens (%)", ylabel="training loss (nats per token)")
    axes.grid(axis="y")
    _label_ends(axes, labels)


def draw_map(axes: Axes, map2d: dict[str, list[Any]]) -> None:
    """Documents in two dimensions; a cluster has a color, a marker, and its number at the mean of its points."""
    xy, cluster = np.column_stack([map2d["x"], map2d["y"]]), np.array(map2d["cluster"])
    ids = np.unique(cluster)
    for j in ids:
        x, y = xy[cluster == j].T
        axes.scatter(x, y, s=9, color=PALETTE[j % 10], marker=MARKERS[j % 10], alpha=0.55, lw=0)
    for j in ids:
        box = {"boxstyle": "round,pad=0.25", "facecolor": _CARD, "edgecolor": PALETTE[j % 10], "linewidth": 1.6}
        x, y = xy[cluster == j].mean(axis=0)
        axes.text(x, y, str(j), ha="center", va="center", weight="bold", bbox=box)
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[:].set_visible(False)
