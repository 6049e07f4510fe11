"""PNG pictures of a results file: speed-ups as bars per shape, and every row against the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .rows import Row, read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 120


class NoMatplotlib(ImportError):
    """The extra is not installed."""


def draw(results: Path, directory: Path) -> list[Path]:
    """Draw everything measured in `results` into `directory`: one picture of bars per op and mode, one roofline."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoMatplotlib('plots need matplotlib: pip install "fastdistill[bench]"') from error

    # Rows without a roofline are whole programs: a bar or two say no more than the table.
    rows = [row for row, _ in read_jsonl(results) if row.limit is not None and row.speed is not None]
    pictures = []

    def save(figure: Figure, name: str) -> None:
        FigureCanvasAgg(figure)
        path = directory / f"{name}.png"
        figure.savefig(path, dpi=_DPI)
        pictures.append(path)

    for op, mode in dict.fromkeys((row.key.op, row.key.mode) for row in rows):
        own = [row for row in rows if (row.key.op, row.key.mode) == (op, mode)]
        panels, providers = _panels(own), _providers(own)
        shapes = max(len(_shapes(panel)) for panel in panels.values())
        width = max(7.0, 2.0 + shapes * (0.25 + 0.12 * len(providers)))
        figure = Figure(figsize=(width, 1.3 + 2.8 * len(panels)), layout="constrained")
        figure.suptitle(f"{op}, {mode}: times as fast as {own[0].baseline}")
        for axes, (title, panel) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items()):
            _bars(axes, title, panel, providers)
        handles = {label: bar for axes in figure.axes for bar, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)))
        save(figure, f"{op}-{mode}")
    if rows:
        figure = Figure(figsize=(9, 6), layout="constrained")
        _roofline(figure.subplots(), rows)
        figure.legend(loc="outside right upper", fontsize="small")
        save(figure, "roofline")
    return pictures


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that share dtype, layout and cache."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        title = ", ".join(part for part in (row.key.dtype, row.key.layout, row.key.cache) if part != "-")
        panels.setdefault(title, []).append(row)
    return panels


def _shapes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.key.case for row in rows))


def _providers(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.key.provider for row in rows))


def _bars(axes: Axes, title: str, rows: Sequence[Row], providers: Sequence[str]) -> None:
    """`providers` decide places and colours, so that both are the same in every panel."""
    shapes = _shapes(rows)
    width = 0.8 / len(providers)
    for index, provider in enumerate(providers):
        own = [row for row in rows if row.key.provider == provider]
        if not own:
            continue
        places = [shapes.index(row.key.case) + (index - (len(providers) - 1) / 2) * width for row in own]
        ratios = [row.speed.ratio for row in own]
        spread = [
            [row.speed.ratio - row.speed.ratio_low for row in own],
            [row.speed.ratio_high - row.speed.ratio for row in own],
        ]
        axes.bar(
            places, ratios, width, yerr=spread, error_kw={"elinewidth": 0.8}, color=f"C{index % 10}", label=provider
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_title(title, fontsize="medium", loc="left")
    axes.set_xticks(range(len(shapes)), shapes, rotation=40, ha="right", fontsize="small")
    axes.set_xlim(-0.7, len(shapes) - 0.3)


def _roofline(axes: Axes, rows: Sequence[Row]) -> None:
    """A colour per provider, a marker per op."""
    ops, providers = list(dict.fromkeys(row.key.op for row in rows)), _providers(rows)
    for op, provider in dict.fromkeys((row.key.op, row.key.provider) for row in rows):
        own = [row for row in rows if (row.key.op, row.key.provider) == (op, provider)]
        axes.scatter(
            [row.limit.us for row in own],
            [row.speed.ours_us for row in own],
            s=16,
            color=f"C{providers.index(provider) % 10}",
            marker="os^Dv"[ops.index(op) % 5],
            label=f"{op}, {provider}",
        )
    ends = min(row.limit.us for row in rows) / 2, 2 * max(row.limit.us for row in rows)
    for percent, style in ((100, "-"), (50, "--"), (10, ":")):
        axes.plot(ends, [end * 100 / percent for end in ends], style, color="gray", linewidth=0.9)
        axes.annotate(
            f"{percent} %", (ends[1], ends[1] * 100 / percent), color="gray", fontsize="small", ha="right", va="bottom"
        )
    axes.set(xscale="log", yscale="log", xlabel="least time, us (roofline)", ylabel="measured, us")
    axes.set_title("every row against the roofline of its machine", fontsize="medium", loc="left")
