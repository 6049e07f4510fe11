"""What a loss keeps for its backward pass and holds at its peak: `python -m fastdistill.bench.loss_memory`.

Fused losses against the same as one writes them, forward and backward. Counted are bytes beyond the inputs and their
gradients, each storage once, on the CPU: what is allocated there is allocated on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import typer
from fastdistill.training.activations import SavedTensors
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdistill import diffusion, losses

Loss = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """A loss twice: `eager(**inputs)` and `fused(**inputs)`. The inputs that require a gradient are what it trains."""

    name: str
    eager: Loss
    fused: Loss
    inputs: Callable[[], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Memory:
    """Bytes beyond the inputs and their gradients: kept from the forward to the backward pass, and at most at a time.

    Results of a few bytes (the loss, its gradient) are in the peak.
    """

    saved: int
    peak: int


def measure(loss: Loss, inputs: dict[str, torch.Tensor]) -> Memory:
    """One forward and one backward pass."""
    owned = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
    saved = SavedTensors(owned)
    with saved:
        loss(**inputs)
    trained = [t for t in owned if t.requires_grad]
    with _LiveStorages(owned) as live:
        value = loss(**inputs)
        gradients = torch.autograd.grad(value, trained)
    own = {storage_of(t) for t in gradients}
    return Memory(saved.nbytes, live.peak_without(own))


class _LiveStorages(TorchDispatchMode):
    """Notes, at every op, which storages live beside `owned`: made, and not yet freed."""

    def __init__(self, owned: list[torch.Tensor]) -> None:
        super().__init__()
        self._owned = {storage_of(t) for t in owned}
        self._live: dict[int, int] = {}  # a storage's number to its bytes
        self._numbers: dict[int, int] = {}  # its address, while it lives, to its number: addresses are used again
        self._moments: list[dict[int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self._note(t.untyped_storage())
        self._moments.append(dict(self._live))
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._owned or address in self._numbers:
            return
        number = self._numbers[address] = len(self._moments) * 1000 + len(self._live)
        self._live[number] = storage.nbytes()
        weakref.finalize(storage, self._forget, address, number)

    def _forget(self, address: int, number: int) -> None:
        self._numbers.pop(address, None)
        self._live.pop(number, None)

    def peak_without(self, addresses: set[int]) -> int:
        """The most bytes at a time, those storages (which still live) left out."""
        left_out = {self._numbers[address] for address in addresses}
        return max(sum(size for n, size in moment.items() if n not in left_out) for moment in self._moments)


def storage_of(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata
