"""What the demo says, for the page and for the picture alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .result import DemoResult

if TYPE_CHECKING:
    from rich.table import Table


def headline(result: DemoResult) -> str:
    return f"One step instead of {_number(result.teacher.steps)}"


def explanation(result: DemoResult) -> str:
    """Two sentences, for someone who sees this for the first time."""
    steps = _number(result.teacher.steps)
    return (
        f"A diffusion model draws a digit by clearing away noise in {steps} careful steps; hurried to a single one, "
        "it can only draw the average of every such digit it has seen. "
        "Its student, a network of the same size distilled by distribution matching, starts from the same noise and "
        "needs one step."
    )


def definitions(result: DemoResult) -> dict[str, str]:
    return {
        "Time": f"is the median of {result.timed} images made one at a time, the rows in turn; beside it the 20 % and "
        "80 % quantiles.",
        "Fréchet distance": f"compares the 8 × 8 pixel values of {result.images} images with those of all 1797 real "
        "digits; 0 is indistinguishable.",
        "Recognised": "is the share in which a classifier fitted on the real digits sees the digit that was asked for.",
        "Diversity": "is how far apart images of one digit lie, compared with real ones; 1 is as varied as they are.",
    }


def warning(result: DemoResult) -> str:
    """What must be said beside the times; empty where they can be trusted."""
    if not result.disturbed:
        return ""
    return "The machine was busy with something else meanwhile: these times are not to be relied on."


def facts(result: DemoResult) -> dict[str, str]:
    machine, versions = result.machine, dict(result.versions)
    versions.pop("fastdistill", None)
    lines = {
        "Machine": f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, {machine['system']}",
        "Networks ran on": machine["device"],
        "Software": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Seed": f"{result.seed}; image i starts from the noise of seed + i",
        "Date": result.date,
    }
    if result.training:
        lines["Trained just now"] = (
            f"{result.training.method}, {result.training.updates} updates of the student in "
            f"{seconds_and_minutes(result.training.seconds)}"
        )
    return lines


def summary(result: DemoResult) -> Table:
    """The figures as a table for a terminal."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for column in ("ms per image", "FD", "recognised", "diversity"):
        table.add_column(column, justify="right")
    for row in result.rows:
        table.add_row(
            row.title,
            significant(row.median),
            f"{row.scores.fd:.2f}",
            f"{100 * row.scores.accuracy:.1f} %",
            f"{row.scores.diversity:.2f}",
            style="bold" if row is result.student else "",
        )
    return table


def significant(value: float) -> str:
    """Two or three digits, never an exponent: 0.83, 4.2, 17, 153."""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def seconds_and_minutes(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _number(count: int) -> str:
    return {20: "twenty", 25: "twenty-five", 30: "thirty", 50: "fifty"}.get(count, str(count))
