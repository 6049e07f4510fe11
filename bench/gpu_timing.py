"""GPU timing: replays of a CUDA graph of many calls, with inputs and outputs out of the L2 cache ("cold") or left in it
("hot"), and plain calls between two events ("eager"). Ours and the baseline take turns, replay by replay.

`gpu` is a `gpu.Gpu`, or what imitates one.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .timing import PairTimes, Run

if TYPE_CHECKING:
    from .gpu import Gpu

WARM_UP_CALLS = 3  # cuDNN and cuBLAS choose and allocate, Triton compiles: none of it may happen while recording
# A graph holds at least so many calls, so that launching it costs little per call,
MIN_CALLS = 20
# and rotates through at most so many sets of buffers,
MAX_SETS = 1024
# which take at most this share of the free memory (both sides hold outputs beside the inputs that they share).
MEMORY_SHARE = 1 / 6


@dataclass(frozen=True)
class Rotation:
    """How many sets of inputs and outputs the calls go through; `cold` if together they exceed twice the L2 cache."""

    sets: int
    cold: bool


@dataclass(frozen=True)
class Timed:
    """`how`: "graph" or "events"; `note`: why not as asked. `launches`: graph nodes per call of ours, where known."""

    times: PairTimes
    how: str
    note: str = ""
    launches: float | None = None


def rotation(set_bytes: int, l2_bytes: int, free_bytes: int) -> Rotation:
    """Enough sets of `set_bytes` each (inputs and outputs of one call) to exceed twice the L2 cache, and at least two,
    as far as they fit."""
    wanted = max(2, 2 * l2_bytes // set_bytes + 1)
    affordable = max(1, int(free_bytes * MEMORY_SHARE) // set_bytes)
    sets = min(wanted, affordable, MAX_SETS)
    return Rotation(sets, cold=sets > 1 and sets * set_bytes > 2 * l2_bytes)


def time_replays(
    gpu: Gpu, ours: Callable[[], Sequence[Run]], baseline: Callable[[], Sequence[Run]], replays: int
) -> Timed:
    """Time two things by graph replay, in turn; with events around plain calls where one of them cannot be recorded.

    Args:
        ours, baseline: make the calls, one per set of buffers, on the stream that they will run on.
        replays: timed per side.
    """
    with gpu.stream():
        both = [_warmed_up(make()) for make in (ours, baseline)]
        try:
            # Kept until the end: a graph replays into memory that is its own.
            recordings = [gpu.record(_rotate(runs, _calls(runs))) for runs in both]
        except RuntimeError as error:
            gpu.synchronize()
            times = _take_turns(gpu, [_rotate(runs, _calls(runs)) for runs in both], map(_calls, both), replays)
            return Timed(times, "events", f"not recorded in a graph: {' '.join(str(error).split())[:200]}")
        times = _take_turns(gpu, [recording.replay for recording in recordings], map(_calls, both), replays)
        nodes = recordings[0].nodes
        return Timed(times, "graph", launches=None if nodes is None else nodes / _calls(both[0]))


def time_calls(
    gpu: Gpu, ours: Callable[[], Sequence[Run]], baseline: Callable[[], Sequence[Run]], samples: int
) -> Timed:
    """Time plain calls between two events, in turn: what a program that launches from Python sees."""
    with gpu.stream():
        both = [_warmed_up(make()) for make in (ours, baseline)]
        times = _take_turns(gpu, [_rotate(runs, _calls(runs)) for runs in both], map(_calls, both), samples)
        return Timed(times, "events")


def _warmed_up(runs: Sequence[Run]) -> Sequence[Run]:
    for run in itertools.islice(itertools.cycle(runs), max(WARM_UP_CALLS, len(runs))):
        run()
    return runs


def _calls(runs: Sequence[Run]) -> int:
    """Whole rounds through the sets."""
    return len(runs) * -(-MIN_CALLS // len(runs))


def _rotate(runs: Sequence[Run], calls: int) -> Callable[[], None]:
    """Calls them in turn. A result is freed just before the call that has its place in the next round, so that outputs
    rotate through as many buffers as inputs do: one in the case of one set."""

    def work() -> None:
        results: deque[object] = deque()
        for run in itertools.islice(itertools.cycle(runs), calls):
            if len(results) == len(runs):
                results.popleft()
            results.append(run())

    return work


def _take_turns(gpu: Gpu, both: Sequence[Callable[[], None]], calls: Sequence[int], samples: int) -> PairTimes:
    """Everything is queued before anything is read, so that the device never waits for the host."""
    marks: list[list[tuple[object, object]]] = [[], []]
    for work in both:
        work()
    for sample in range(samples):
        for side in (0, 1) if sample % 2 == 0 else (1, 0):
            start = gpu.mark()
            both[side]()
            marks[side].append((start, gpu.mark()))
    gpu.synchronize()
    nanoseconds = (
        tuple(1e3 * gpu.elapsed_us(start, end) / count for start, end in each) for each, count in zip(marks, calls)
    )
    return PairTimes(*nanoseconds)
