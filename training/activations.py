"""How many bytes a forward pass keeps for its backward, counted without a GPU and without memory.

Under fake tensors (`torch._subclasses.FakeTensorMode`) a full SDXL UNet takes seconds and no memory: every op says what
it would save, nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.utils._pytree import tree_leaves


class SavedTensors:
    """Counts the memory that stays alive between the forward and the backward pass, each storage once.

    Use as a context around the forward pass. What the network owns anyway (`owned`: parameters, buffers) is not
    counted.
    """

    def __init__(self, owned: Iterable[torch.Tensor] = ()) -> None:
        self._owned = {_storage(t) for t in owned}
        self._seen: dict[int, torch.UntypedStorage] = {}  # kept alive: an address is used again once it is free
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, t: torch.Tensor) -> torch.Tensor:
        self.keep(t)
        return t

    def keep(self, t: torch.Tensor) -> None:
        """Count a tensor that something else than autograd keeps, as a checkpointed block keeps its inputs."""
        if _storage(t) not in self._owned:
            self._seen[_storage(t)] = t.untyped_storage()

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self._seen.values())

    def checkpoint(self, function: Callable, *args, **kwargs):
        """`torch.utils.checkpoint.checkpoint` that counts what it keeps: the block's inputs.

        For `model.enable_gradient_checkpointing(saved.checkpoint)` of diffusers.
        """
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, torch.Tensor):
                self.keep(t)
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


def _storage(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata
