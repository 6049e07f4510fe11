"""What GPU timing asks of torch.cuda: a side stream, recorded graphs, marks on the stream, memory. No logic."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recording:
    """Work recorded in a CUDA graph: `replay()` launches all of it; `nodes` are its kernels, copies and fills."""

    replay: Callable[[], None]
    nodes: int | None


class Gpu:
    """One device. Everything that is timed runs on one stream of its own, the one that graphs are recorded on: autograd
    runs a backward pass on the stream of its forward pass, and a recording holds what its own stream does."""

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self.device)

    @property
    def l2_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    def free_bytes(self) -> int:
        """Of device memory, what torch holds in reserve included."""
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Work of this block runs on the side stream, after what was queued before and before what comes after."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Recording:
        """Record what `work` launches. Raises RuntimeError where it cannot be recorded."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)  # so that its nodes can be counted
        # The outer context restores the stream where a failing recording does not get to it.
        with torch.cuda.stream(self._stream), torch.cuda.graph(graph, stream=self._stream):
            work()
        graph.instantiate()
        return Recording(graph.replay, _nodes(graph.raw_cuda_graph()))

    def mark(self) -> torch.cuda.Event:
        """A point on the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_us(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Microseconds between two marks; waits for the second."""
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """What `work` allocates at most at one time, its result included."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = work()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del result
        return peak

    def release(self) -> None:
        """Give memory back that graphs of earlier rows held."""
        gc.collect()
        torch.cuda.empty_cache()


def _nodes(graph: int) -> int | None:
    """Counted by the driver (cuGraphGetNodes): a profiler would slow down what is timed after it."""
    count = ctypes.c_size_t()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    failed = driver.cuGraphGetNodes(ctypes.c_void_p(graph), None, ctypes.byref(count))
    return None if failed else count.value
