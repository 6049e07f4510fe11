"""`--profile`: calls every provider in ranges that have names, and writes a trace that Perfetto opens."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .modes import MODES
from .runner import DTYPES, Selection

TRACE = "trace.json"
CALLS = 5
_WARM_UP_CALLS = 3


def profile(selections: Sequence[Selection], directory: Path) -> tuple[Path, list[str]]:
    """Call what is selected, `CALLS` times each, once plainly (for Nsight, which sees the NVTX ranges) and once under
    torch's profiler. Returns the trace and the names of the ranges, "op:provider:mode:dtype:layout:shape"."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes lines of its own to stderr
    on_gpu = any(selection.gpu is not None for selection in selections)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for selection in selections:
        for _ in _calls(selection):
            pass
    with torch.profiler.profile(activities=activities) as profiler:
        names = [name for selection in selections for name in _calls(selection)]
    path = directory / TRACE
    profiler.export_chrome_trace(str(path))
    return path, names


def _calls(s: Selection) -> Iterator[str]:
    device = torch.device("cpu") if s.gpu is None else s.gpu.device
    for mode, dtype, layout, case in itertools.product(s.modes, s.dtypes, s.layouts, s.cases):
        inputs = s.benchmark.setup(case, DTYPES[dtype], layout, device)
        for provider in s.providers:
            if provider.missing(inputs):
                continue
            step = MODES[mode](provider.prepare(inputs), provider.adapt(inputs))
            for _ in range(_WARM_UP_CALLS):
                step.run()
            # No "/": Nsight Compute's filters read it as the end of a range's name.
            name = f"{s.benchmark.op}:{provider.name}:{mode}:{dtype}:{layout}:{case.name}"
            for _ in range(CALLS):
                with _range(name, device):
                    step.run()
            if s.gpu is not None:
                s.gpu.synchronize()
            yield name


@contextlib.contextmanager
def _range(name: str, device: torch.device) -> Iterator[None]:
    nvtx = torch.cuda.nvtx.range(name) if device.type == "cuda" else contextlib.nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield
