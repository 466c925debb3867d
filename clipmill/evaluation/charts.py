"""Charts of the report: SVG text that takes its colours and fonts from the page around it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["code_usage_chart", "loss_chart", "nats_chart"]

# Matplotlib writes fixed colours. These stand for the page's own, so that a chart follows light and dark.
_COLOURS = {"#010203": "--ink", "#010204": "--soft", "#010205": "--line", "#010206": "--first", "#010207": "--second"}
_INK, _SOFT, _LINE, _FIRST, _SECOND = _COLOURS
_MAX_POINTS = 600
"""More points than a chart has pixels only make the page heavy."""
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "text.color": _INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
}


def loss_chart(title: str, records: Sequence[dict[str, Any]], unit: str, marks: dict[str, float]) -> Markup:
    """Loss over steps, train as a line and val as a line with dots.

    Args:
        title: read out in place of the picture.
        records: of `clipmill.metrics.read_metrics`.
        unit: of the loss.
        marks: losses that horizontal lines show, by name.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(5.2, 2.9)
        lowest, highest = np.inf, -np.inf
        for split, colour, marker in (("train", _FIRST, None), ("val", _SECOND, "o")):
            own = [record for record in records if record["split"] == split and "loss" in record]
            rows = [(record["step"], record["loss"]) for record in own]
            if not rows:
                continue
            steps, losses = _thinned(np.array(rows, np.float64))
            axes.plot(steps, losses, color=colour, linewidth=1.4, marker=marker, markersize=3, label=split)
            finite = losses[np.isfinite(losses)]
            lowest, highest = min(lowest, finite.min(initial=np.inf)), max(highest, finite.max(initial=-np.inf))
        for name, value in marks.items():
            axes.axhline(value, color=_SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.annotate(name, (1, value), (0, 2), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                          ha="right", va="bottom", color=_SOFT, fontsize=8)  # fmt: skip
        if 0 < 8 * lowest < highest:  # the fall of the first steps would flatten all the rest
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.legend(frameon=False, loc="lower left" if marks else "upper right")
        return _svg(figure, title)


def code_usage_chart(title: str, sorted_counts: Sequence[int]) -> Markup:
    """How often each code occurs, most frequent first, in multiples of an even share."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(5.2, 2.9)
        counts = np.array(sorted_counts, np.float64)
        multiples = counts / counts.mean()
        shown = np.unique(np.linspace(0, len(counts) - 1, min(len(counts), _MAX_POINTS)).astype(int))
        axes.fill_between(shown + 1, multiples[shown], color=_FIRST, alpha=0.25, linewidth=0, step="mid")
        axes.step(shown + 1, multiples[shown], color=_FIRST, linewidth=1.4, where="mid")
        axes.axhline(1, color=_SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate("all codes alike", (1, 1), (0, 2), xycoords=axes.get_yaxis_transform(),
                      textcoords="offset points", ha="right", va="bottom", color=_SOFT, fontsize=8)  # fmt: skip
        axes.set_xlim(1, max(2, len(counts)))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("codes, most frequent first")
        axes.set_ylabel("times its even share")
        return _svg(figure, title)


def nats_chart(title: str, nats: dict[str, float]) -> Markup:
    """Bars of cross-entropies in nats per token; the first one is the prior's."""
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        figure, axes = _canvas(5.2, 0.5 + 0.42 * len(nats))
        for row, (name, value) in enumerate(nats.items()):
            axes.barh(row, value, height=0.62, color=_FIRST if row == 0 else _LINE)
            axes.annotate(f"{value:.3f}", (value, row), (5, 0), textcoords="offset points", va="center")
            axes.annotate(name, (0, row), (-6, 0), textcoords="offset points", va="center", ha="right")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max(nats.values()))
        axes.set_yticks([])
        axes.set_xlabel("nats per token")
        axes.spines["left"].set_visible(False)
        return _svg(figure, title)


def _canvas(width_inches: float, height_inches: float) -> tuple[Figure, Axes]:
    figure = Figure((width_inches, height_inches), layout="constrained")
    return figure, figure.add_subplot()


def _thinned(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MAX_POINTS` of (step, loss) rows: neighbours are averaged."""
    group = -(-len(rows) // _MAX_POINTS)
    means = [rows[start : start + group].mean(axis=0) for start in range(0, len(rows), group)]
    steps, losses = np.array(means).T
    return steps, losses


def _svg(figure: Figure, title: str) -> Markup:
    """The drawing without its fixed size and colours."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # ids repeat from run to run, not from chart to chart
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    opening, rest = drawing.split(">", 1)
    viewbox = opening[opening.index("viewBox=") :].split('"')[1]
    for colour, variable in _COLOURS.items():
        rest = rest.replace(colour, f"var({variable})")
    return Markup('<svg class="chart" role="img" aria-label="{}" viewBox="{}">').format(title, viewbox) + Markup(rest)
