"""How training runs on the digits got where they are: Frechet distance and accuracy over the training's time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Curve:
    """A run's validations of its averaged student, in one step.

    Attributes:
        method: of the run.
        seconds: of training before each, those of the stages before included.
        fd, accuracy: found then.
    """

    method: str
    seconds: tuple[float, ...]
    fd: tuple[float, ...]
    accuracy: tuple[float, ...]


def read_curve(folder: str | Path) -> Curve:
    """From the log of a run that was watched (`--watch FOLDER`) and validated (`--set validation.kind=digits`).

    Raises:
        ValueError: no log there, or one without validations of digits.
    """
    path = Path(folder) / "log.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: needed the folder of a watched run, with {path.name} ({error})") from error
    before, last, points, method = 0.0, {}, {}, ""
    for record in records:
        if last and record["stage"] != last["stage"]:
            before += last["seconds"]
        last, method = record, record["method"]
        if record.get("validated") is not None:
            place = (record["stage"], record["validated"])
            points.setdefault(place, (before + record["seconds"], record["validation"]))
    try:
        found = [(seconds, figures["fd"], figures["accuracy"]) for seconds, figures in points.values()]
        seconds, fd, accuracy = zip(*found)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: no validation of digits in it; train with --set validation.kind=digits") from error
    return Curve(method, seconds, fd, accuracy)


def draw_curves(curves: Sequence[Curve], path: str | Path) -> None:
    """Write a PNG: Frechet distance (logarithmic) and accuracy over seconds, a line per run, a colour per method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    methods = list(dict.fromkeys(curve.method for curve in curves))
    for curve in curves:
        colour = f"C{methods.index(curve.method)}"
        first = curve is next(each for each in curves if each.method == curve.method)
        label = curve.method if first else None
        left.plot(curve.seconds, curve.fd, color=colour, marker=".", linewidth=1, label=label)
        right.plot(curve.seconds, curve.accuracy, color=colour, marker=".", linewidth=1)
    left.set(yscale="log", xlabel="seconds of training", ylabel="Frechet distance, one step")
    right.set(xlabel="seconds of training", ylabel="accuracy, one step")
    left.minorticks_off()
    left.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    left.legend(title="a line per training seed", frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
