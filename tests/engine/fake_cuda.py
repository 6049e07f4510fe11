"""CUDA graphs on a CPU, for the logic around them: the same functions of torch.cuda, recording and replaying for real.

A recording is the list of operations that were dispatched; replaying runs them again on the tensors of the recording,
results into the tensors that were results then. So what is not read from an input buffer does not change from replay to
replay, and results are overwritten, as on a device. Streams, events and the memory pool do nothing here.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class FakeGraph:
    def __init__(self):
        self.operations = []
        self.replays = 0

    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for then, now in zip(tensors_of(result), tensors_of(again)):
                if then.data_ptr() != now.data_ptr():
                    then.copy_(now)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.graph.operations.append((function, args, kwargs or {}, result))
        return result


def tensors_of(result):
    results = result if isinstance(result, (tuple, list)) else [result]
    return [one for one in results if isinstance(one, torch.Tensor)]


def install(monkeypatch):
    """Put the fake in torch.cuda's place; returns what it counts: `recording` and the `graphs` made."""
    state = SimpleNamespace(recording=False, graphs=[])
    stream = SimpleNamespace(wait_event=lambda event: None, wait_stream=lambda other: None, synchronize=lambda: None)

    def new_graph():
        state.graphs.append(FakeGraph())
        return state.graphs[-1]

    @contextlib.contextmanager
    def record(graph, **_):
        state.recording = True
        try:
            with _Recorder(graph):
                yield
        finally:
            state.recording = False

    replacements = {
        "CUDAGraph": new_graph,
        "Event": lambda: SimpleNamespace(record=lambda stream: None, synchronize=lambda: None),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "device": lambda device: contextlib.nullcontext(),
        "graph": record,
        "graph_pool_handle": object,
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    return state
