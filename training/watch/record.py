"""A report of the loop as plain values: what the log keeps, and everything else is drawn from."""

from __future__ import annotations

import math
import sys
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..progress import TrainingProgress

Record = dict[str, Any]

GROUPS = ("losses", "learning_rates", "gradient_norms", "validation")
"""The names under which a record holds figures by name."""


def record(progress: TrainingProgress) -> Record:
    """JSON values alone. A figure that is not finite is None, and `not_finite` says which were, and what they were."""
    peak, whose = memory(progress)
    line: Record = {
        "stage": progress.stage,
        "method": progress.stage if progress.method is None else progress.method.name,
        "update": progress.update,
        "total": progress.total,
        "seconds": round(progress.seconds, 3),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    strange: dict[str, str] = {}
    for group in GROUPS:
        figures = {name: float(value) for name, value in getattr(progress, group).items()}
        strange |= {f"{group}.{name}": str(value) for name, value in figures.items() if not math.isfinite(value)}
        line[group] = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    line |= {"validated": progress.validated, "best": progress.best}
    line |= {"updates": dict(progress.updates), "skipped": dict(progress.skipped)}
    line |= {"peak_bytes": peak, "peak_of": whose, "not_finite": strange}
    return line


def figure(line: Record, group: str, name: str) -> float:
    """A figure of a record as it was, NaN and infinities included; NaN where the record has none."""
    value = line[group].get(name)
    if value is not None:
        return value
    return float(line["not_finite"].get(f"{group}.{name}", "nan"))


def memory(progress: TrainingProgress) -> tuple[int | None, str]:
    """(bytes, whose): the device's high-water mark, on the CPU that of the process; None where no system tells it."""
    if progress.peak_bytes is not None:
        return progress.peak_bytes, "device"
    try:
        import resource
    except ImportError:
        return None, "process"
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "process"
