"""What a call takes besides time: memory at its peak, and how many kernels or ops it runs."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_OURS_AND_TORCHS = ("aten::", "fastdistill::")


@dataclass(frozen=True)
class Usage:
    """What one call takes; None where it cannot be told.

    Attributes:
        peak_bytes: allocated at most at one time beyond the inputs, the results included.
        launches: on a GPU kernels, copies and fills per call; on a CPU ops called from outside any other.
    """

    peak_bytes: int | None = None
    launches: float | None = None


def on_cpu(run: Callable[[], object], *, compiled: bool = False) -> Usage:
    """From torch's profiler. `compiled`: what is dispatched is not what runs, so it is not counted."""
    events = _trace(run)
    allocated = [
        event["args"]
        for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["args"].get("Ev Idx", 0))
        if event["args"]["Device Type"] == 0
    ]
    peak = total = 0
    for change in allocated:  # summed up here: the profiler's own total has another program's past in it
        total += change["Bytes"]
        peak = max(peak, total)
    ops = [e for e in events if e.get("cat") == "cpu_op" and e["name"].startswith(_OURS_AND_TORCHS)]
    return Usage(peak, None if compiled else _outermost(ops))


def _trace(run: Callable[[], object]) -> list[dict]:
    # torch's profiler writes two lines of its own to stderr per use; read when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = run()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def _outermost(ops: list[dict]) -> int:
    """How many lie in no other of the same thread."""
    count, ends = 0, {}
    for op in sorted(ops, key=lambda e: (e["ts"], -e["dur"])):
        if op["ts"] >= ends.get(op["tid"], float("-inf")):
            count += 1
            ends[op["tid"]] = op["ts"] + op["dur"]
    return count
