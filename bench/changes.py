"""Two results files compared row by row: what became faster or slower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .rows import Row

# What makes figures of one machine those of another.
_SAME = ("device", "threads", "torch", "triton", "cuda", "cudnn", "driver")


@dataclass(frozen=True)
class Change:
    """One row then and now. `factor`: how many times slower than before (below 1: faster). On a CPU that is told by the
    ratio to the baseline, which outlives a busy machine; on a GPU by the time."""

    row: Row
    factor: float
    elsewhere: str = ""  # what differs between the two environments


def changes(
    now: Sequence[Row], environment: Mapping[str, object], before: Sequence[tuple[Row, Mapping[str, object]]]
) -> list[Change]:
    """For every row measured both times, the worst first."""
    known = {row.key: (row, where) for row, where in before}
    found = []
    for row in now:
        then, where = known.get(row.key, (None, {}))
        if then is None or then.speed is None or row.speed is None:
            continue
        on_cpu = row.key.device == "cpu"
        factor = then.speed.ratio / row.speed.ratio if on_cpu else row.speed.ours_us / then.speed.ours_us
        found.append(Change(row, factor, _differences(where, environment)))
    return sorted(found, key=lambda change: -change.factor)


def describe(found: Sequence[Change], threshold: float, name: str) -> list[str]:
    """A line per row that changed by more than the threshold, and one about all of them."""
    if not found:
        return [f"{name}: no row in common"]
    lines = []
    for change in found:
        if 1 / (1 + threshold) <= change.factor <= 1 + threshold:
            continue
        what = f"{change.factor:.2f}x slower" if change.factor > 1 else f"{1 / change.factor:.2f}x faster"
        where = f" (measured elsewhere: {change.elsewhere})" if change.elsewhere else ""
        lines.append(f"{' '.join(change.row.key.group)} {change.row.key.case}: {what} than in {name}{where}")
    worse = sum(change.factor > 1 + threshold for change in found)
    lines.append(f"{len(found)} rows compared with {name}: {worse} slower by more than {threshold:.0%}")
    return lines


def regressed(found: Sequence[Change], threshold: float) -> bool:
    """Whether any row became slower by more than `threshold` (0.1 is 10 %)."""
    return any(change.factor > 1 + threshold for change in found)


def _differences(then: Mapping[str, object], now: Mapping[str, object]) -> str:
    return ", ".join(
        f"{name} {then.get(name)} then, {now.get(name)} now" for name in _SAME if then.get(name) != now.get(name)
    )
