"""Runs jobs one after the other, with a progress bar, in order of importance where time is short."""

from __future__ import annotations

import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastdistill.ops import BackendError

from .devices import DeviceSpec
from .gpu import Gpu
from .measure import measured
from .rows import Key, Row
from .runner import Job, Selection, raised

SAVE_EVERY = 15.0
# Earlier is more important: what inference does, as it does it, first.
_ORDER = {
    "mode": ("forward", "full", "backward"),
    "dtype": ("bfloat16", "float16", "float32"),
    "layout": ("channels_last", "contiguous"),
}
_FILES = {"engine": ("engine",), "training": ("training", "training_memory")}
_KERNELS = ("cuda", "triton", "cpu", "fastdistill")  # before whom they are compared with


def open_gpu() -> Gpu:
    """The first GPU."""
    return Gpu()


def limits(device: str) -> DeviceSpec:
    """What this machine can do at most, measured."""
    return measured(device, torch.get_num_threads())


def jobs(selections: Sequence[Selection]) -> list[Job]:
    """Of all selections, in their order."""
    return [job for selection in selections for job in selection.jobs()]


def whole_jobs(names: Sequence[str], device: str, pairs: int, gpu: Gpu | None) -> list[Job]:
    """Of "engine" and "training"."""
    files = [file for name in names for file in _FILES[name]]
    return [
        job for file in files for job in importlib.import_module(f"fastdistill.bench.{file}").jobs(device, pairs, gpu)
    ]


def by_importance(work: Sequence[Job]) -> list[Job]:
    """Sorted by how far the settings stand from those that matter most; equal ones stay in their order."""
    return sorted(work, key=lambda job: _rank(job.keys[0]))


def run(
    work: Sequence[Job],
    seconds: float | None = None,
    *,
    save: Callable[[Sequence[Row]], object] = lambda rows: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[list[Row], list[Key]]:
    """The rows, and the keys of those that were left out because `seconds` were over (never without a limit).

    `save` is called with all rows so far every `SAVE_EVERY` seconds: what breaks later costs no more than that.
    """
    if seconds is not None:
        work = by_importance(work)
    saved = clock()
    end = float("inf") if seconds is None else clock() + seconds
    rows: list[Row] = []
    left_out: list[Key] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(len(job.keys) for job in work))
        for job in work:
            done = 0
            if clock() < end:
                for row in _measure(job):
                    rows.append(row)
                    done += 1
                    bar.update(task, advance=1, description=" ".join((*row.key.group, row.key.case)))
                    if clock() >= end:
                        break
            left_out += job.keys[done:]
            if clock() - saved >= SAVE_EVERY:
                save(rows)
                saved = clock()
    return rows, left_out


def _measure(job: Job) -> Iterator[Row]:
    """What a job yields; if it breaks, rows that say so for the rest of its keys."""
    done = 0
    try:
        for row in job.rows():
            done += 1
            yield row
    except BackendError:
        raise  # asked for by the user's own environment
    except Exception as error:
        for key in job.keys[done:]:
            yield raised(key, job.baseline, error)


def describe_left_out(left_out: Sequence[Key]) -> list[str]:
    """A line per kind of row."""
    kinds = Counter((key.op, key.mode, key.dtype, key.layout) for key in left_out)
    if not kinds:
        return []
    lines = [f"  {' '.join(kind)}: {count}" for kind, count in kinds.items()]
    return [f"the budget is over, {len(left_out)} rows were left out:", *lines]


def _rank(key: Key) -> int:
    return (key.provider not in _KERNELS) + sum(
        known.index(value) if (value := getattr(key, name)) in known else 0 for name, known in _ORDER.items()
    )
