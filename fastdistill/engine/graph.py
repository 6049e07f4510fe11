"""CUDA graphs: one recording per shape of everything from latents to pixels, replayed without launching from Python.

A recording reads its inputs from buffers that stay where they are, and leaves its output in one. All recordings share
one memory pool. That is safe only because they never run at the same time and no result outlives the lock that is held
here: each is copied out before the next replay may overwrite it, on whatever stream that runs.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_WARM_UP_RUNS = 3  # cuDNN and cuBLAS choose and allocate, Triton compiles: none of it may happen while recording
_ONE_AT_A_TIME = threading.Lock()  # torch allows one recording at a time in a process, whichever engine makes it


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Mapping[str, Tensor]
    output: Tensor
    keeps: object  # constants whose addresses were recorded


class GraphCache:
    """Runs functions as CUDA graphs; the `capacity` kinds of call used last are kept. Thread-safe.

    A call that cannot be recorded is warned about, runs eagerly, and ends recording for this cache: a recording that
    fails leaves torch's allocator in doubt about its pool. What was recorded before is still replayed.

    Attributes:
        failure: why recording ended; empty while it has not.
    """

    def __init__(self, device: torch.device, capacity: int = 8) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1; got {capacity}")
        self.failure = ""
        self._device = device
        self._capacity = capacity
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._lock = threading.Lock()
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # recordings that share a pool must share the stream
            self._free = torch.cuda.Event()  # the last replay no longer reads its inputs nor fills its output

    def __len__(self) -> int:
        return len(self._recordings)

    def run(
        self, key: Hashable, function: Callable[..., Tensor], inputs: Mapping[str, Tensor], keeps: object = None
    ) -> Tensor:
        """`function(**inputs)`, replayed from the recording of `key`, which the first call makes.

        Args:
            key: everything that decides which kernels run: shapes, dtypes, number of steps, kind of output.
            function: takes the inputs by name, returns one tensor, never waits for the device.
            inputs: tensors on this device, always of the same shapes and dtypes for one key.
            keeps: what the recording must keep alive besides its inputs, such as folded constants.

        Returns:
            A tensor of the caller's own, ready on the current stream.
        """
        with torch.cuda.device(self._device):
            with self._lock:
                recording = self._recordings.get(key) or self._try_to_record(key, function, inputs, keeps)
                if recording is not None:
                    self._recordings.move_to_end(key)
                    return self._replay(recording, inputs)
            return function(**inputs)

    def _replay(self, recording: _Recording, inputs: Mapping[str, Tensor]) -> Tensor:
        stream = torch.cuda.current_stream()
        stream.wait_event(self._free)
        for name, buffer in recording.inputs.items():
            buffer.copy_(inputs[name], non_blocking=True)
        recording.graph.replay()
        result = recording.output.clone()
        self._free.record(stream)
        return result

    def _try_to_record(
        self, key: Hashable, function: Callable[..., Tensor], inputs: Mapping[str, Tensor], keeps: object
    ) -> _Recording | None:
        if self.failure:
            return None
        buffers = {name: tensor.clone() for name, tensor in inputs.items()}
        self._warm_up(function, buffers)  # what fails here would fail eagerly too
        try:
            with _ONE_AT_A_TIME:
                recording = self._record(function, buffers, keeps)
        except RuntimeError as error:
            self.failure = " ".join(str(error).split())
            warnings.warn(f"fastdistill: no CUDA graph for {key}, running eagerly: {self.failure}", stacklevel=5)
            return None
        self._recordings[key] = recording
        if len(self._recordings) > self._capacity:
            self._free.synchronize()  # the oldest may still be running
            self._recordings.popitem(last=False)
        return recording

    def _warm_up(self, function: Callable[..., Tensor], buffers: Mapping[str, Tensor]) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_RUNS):
                function(**buffers)
        current.wait_stream(self._stream)

    def _record(self, function: Callable[..., Tensor], buffers: Mapping[str, Tensor], keeps: object) -> _Recording:
        graph = torch.cuda.CUDAGraph()
        # The outer context restores the caller's stream where a failing recording does not get to it. "thread_local":
        # other threads may allocate and synchronise meanwhile.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output = function(**buffers)
        return _Recording(graph, buffers, output, keeps)
