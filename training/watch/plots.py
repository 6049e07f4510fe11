"""Curves of a run as PNG, drawn without a display: losses, learning rates, gradient norms, validation."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .record import Record, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DAY = {"paper": "#faf7f1", "ink": "#1d1b17", "soft": "#6d665a", "line": "#ddd5c6", "accent": "#b5371f"}
NIGHT = {"paper": "#15140f", "ink": "#efe9dc", "soft": "#a0978a", "line": "#37332a", "accent": "#ff8263"}
# Told apart by those who see no red or no green too (Okabe and Ito 2008), and on both papers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
SMOOTHED = 60  # from so many reports on, a running mean is drawn over the figures themselves
LOG_FROM = 30.0  # largest over smallest value from which an axis is logarithmic
TITLES = {
    "losses": "losses",
    "learning_rates": "learning rates",
    "gradient_norms": "gradient norms",
    "validation": "validation",
}

TOGETHER = ("learning_rates", "gradient_norms")
"""Groups whose figures share a panel, a line for each role."""


class NoMatplotlib(ImportError):
    """The extra is not installed."""


def need_matplotlib() -> None:
    """Raises NoMatplotlib, whose message says how to install it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise NoMatplotlib('plots need matplotlib: pip install "fastdistill[train]"') from error


def curves(records: Sequence[Record], group: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By name, (updates, figures) of one stage; what was not finite is NaN, and validations are there once each."""
    names = dict.fromkeys(name for line in records for name in line[group])
    found = {}
    for name in names:
        points: dict[int, float] = {}
        for line in records:
            update = line["validated"] if group == "validation" else line["update"]
            if name in line[group] and update is not None:
                value = figure(line, group, name)
                points[update] = value if math.isfinite(value) else math.nan
        found[name] = np.array(list(points)), np.array(list(points.values()))
    return found


def plot(records: Sequence[Record], group: str, colours: dict[str, str] = DAY) -> Figure:
    """One stage's figures of one group. Losses and validation have a panel each, for their scales differ.

    Raises:
        ValueError: there is nothing to draw.
    """
    from matplotlib.figure import Figure

    found = curves(records, group)
    if not found:
        raise ValueError(f"{group}: no figures to draw in {len(records)} reports")
    together = group in TOGETHER
    panels = [found] if together else [{name: curve} for name, curve in found.items()]
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    whole = Figure(figsize=(4.6 * columns, 0.3 + 2.3 * rows), layout="constrained", facecolor=colours["paper"])
    axes = list(whole.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[len(panels) :]:
        unused.remove()
    for index, (place, panel) in enumerate(zip(axes, panels)):
        _panel(place, panel, index, colours)
        place.set_title(TITLES[group] if together else next(iter(panel)), loc="left", color=colours["ink"], fontsize=11)
        if group == "validation":
            _mark_best(place, records, index, next(iter(panel.values())), colours)
        if index >= len(panels) - columns:
            place.set_xlabel("updates of the student", color=colours["soft"], fontsize=9)
    return whole


def plot_png(records: Sequence[Record], group: str, colours: dict[str, str] = DAY, dpi: int = 110) -> bytes:
    """`plot` as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    whole = plot(records, group, colours)
    FigureCanvasAgg(whole)
    file = io.BytesIO()
    whole.savefig(file, format="png", dpi=dpi, facecolor=colours["paper"])
    return file.getvalue()


def described(records: Sequence[Record], group: str) -> str:
    """The same in words, for those who do not see the curves: first, last, lowest and highest of each."""
    sentences = []
    for name, (updates, values) in curves(records, group).items():
        there = np.isfinite(values)
        if there.any():
            updates, values = updates[there], values[there]
            sentences.append(
                f"{name}: {values[0]:.4g} at update {updates[0]}, {values[-1]:.4g} at update {updates[-1]}, between "
                f"{values.min():.4g} and {values.max():.4g}."
            )
    return " ".join(sentences)


def _panel(axes: Axes, panel: dict[str, tuple[np.ndarray, np.ndarray]], first: int, colours: dict[str, str]) -> None:
    for index, (name, (updates, values)) in enumerate(panel.items(), first):
        colour = COLOURS[index % len(COLOURS)]
        many = len(updates) >= SMOOTHED
        few = {"marker": "o", "markersize": 3} if len(updates) <= 30 else {}
        axes.plot(updates, values, color=colour, linewidth=0.8 if many else 1.5, alpha=0.35 if many else 1.0, **few)
        if many:
            axes.plot(updates, _running_mean(values, len(values) // 20), color=colour, linewidth=1.7)
        axes.lines[-1].set_label(name)
    if _is_wide(np.concatenate([values for _, values in panel.values()])):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    if len(panel) > 1:
        axes.legend(frameon=False, labelcolor=colours["ink"], fontsize=9)
    axes.set_facecolor(colours["paper"])
    axes.grid(color=colours["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.yaxis.get_offset_text().set_color(colours["soft"])
    axes.tick_params(colors=colours["soft"], labelsize=9, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colours["soft"])
    axes.margins(x=0.02)


def _mark_best(
    axes: Axes, records: Sequence[Record], index: int, curve: tuple[np.ndarray, np.ndarray], colours: dict[str, str]
) -> None:
    best = records[-1]["best"]
    updates, values = curve
    if best is not None and best in updates:
        value = values[list(updates).index(best)]
        axes.axvline(best, color=colours["accent"], linewidth=0.8, linestyle=":")
        late = best > updates.mean()
        if index == 0:
            axes.annotate(
                f"best: {value:.3g}",
                (best, value),
                xytext=(-4, 8) if late else (4, 8),
                textcoords="offset points",
                ha="right" if late else "left",
                color=colours["accent"],
                fontsize=9,
            )


def _is_wide(values: np.ndarray) -> bool:
    there = values[np.isfinite(values)]
    return len(there) > 1 and there.min() > 0 and there.max() / there.min() >= LOG_FROM


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` figures, of those that are there; NaN where none is."""
    there = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(there)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    many = count[end] - count[start]
    return np.where(many > 0, (total[end] - total[start]) / np.maximum(many, 1), np.nan)
