"""CPU timing: two things run in turn in one process.

An absolute CPU time means little on a machine that others use too, or whose clock moves; the ratio of two calls made
right after each other does. So the two are measured in pairs, A B B A A B …, and the distribution of the per-pair ratio
is reported.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

# A sample lasts at least this long (calls are repeated), so that the clock and one interrupt do not decide it.
MIN_SAMPLE_NS = 1_000_000
WARM_UP_CALLS = 3

Run = Callable[[], object]


@dataclass(frozen=True)
class PairTimes:
    """Nanoseconds per call, one entry per pair."""

    ours: tuple[float, ...]
    baseline: tuple[float, ...]


@dataclass(frozen=True)
class Speed:
    """Medians in microseconds per call, and baseline / ours: its median and its 20 % and 80 % quantiles over pairs.

    `ours_low_us`, `ours_high_us` are the quantiles of our time. `how` it was taken: "clock" (of the host), "graph"
    (CUDA graph replay) or "events" (CUDA events around plain calls).
    """

    ours_us: float
    baseline_us: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int
    ours_low_us: float
    ours_high_us: float
    how: str = "clock"

    @classmethod
    def of(cls, times: PairTimes, how: str = "clock") -> Speed:
        ours, baseline = np.asarray(times.ours), np.asarray(times.baseline)
        ratio_low, ratio, ratio_high = np.quantile(baseline / ours, (0.2, 0.5, 0.8)).tolist()
        low, median, high = (np.quantile(ours, (0.2, 0.5, 0.8)) / 1e3).tolist()
        return cls(
            ours_us=median,
            baseline_us=float(np.median(baseline)) / 1e3,
            ratio=ratio,
            ratio_low=ratio_low,
            ratio_high=ratio_high,
            pairs=len(times.ours),
            ours_low_us=low,
            ours_high_us=high,
            how=how,
        )


def time_pairs(
    ours: Sequence[Run],
    baseline: Sequence[Run],
    pairs: int,
    *,
    clock: Callable[[], int] = time.perf_counter_ns,
    min_sample_ns: int = MIN_SAMPLE_NS,
) -> PairTimes:
    """Time two things in `pairs` pairs, the order within a pair alternating.

    Args:
        ours, baseline: each one call on one set of inputs, or several to be rotated through (on sets that together
            exceed the last-level cache, each call then finds its inputs in memory, not in cache).
        clock: nanoseconds, monotonic.
    """
    first, second = itertools.cycle(ours), itertools.cycle(baseline)
    for _ in range(max(WARM_UP_CALLS, len(ours), len(baseline))):
        next(first)()
        next(second)()
    calls = _calls_per_sample((first, second), clock, min_sample_ns)
    times: dict[Iterator[Run], list[float]] = {first: [], second: []}
    with _no_garbage_collection():
        for pair in range(pairs):
            for runs in (first, second) if pair % 2 == 0 else (second, first):
                times[runs].append(_sample(runs, calls, clock))
    return PairTimes(tuple(times[first]), tuple(times[second]))


def _calls_per_sample(both: Sequence[Iterator[Run]], clock: Callable[[], int], min_sample_ns: int) -> int:
    fastest = min(_sample(runs, 1, clock) for runs in both)
    return max(1, round(min_sample_ns / max(fastest, 1)))


def _sample(runs: Iterator[Run], calls: int, clock: Callable[[], int]) -> float:
    """Nanoseconds per call. A result is freed when the next one exists, as in a model; the last one after the clock."""
    start = clock()
    for _ in range(calls):
        result = next(runs)()
    elapsed = clock() - start
    del result
    return elapsed / calls


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
