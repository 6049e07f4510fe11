"""Keys and values of every cross-attention of a network, from one product, kept per encoded prompt."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistill.engine.attention import DirectAttention
from fastdistill.engine.shared import Shared


class CrossAttentionCache:
    """What a network's cross-attentions make of an encoded prompt before they look at any image. Thread-safe.

    Takes the weights over: each `DirectAttention` reads its columns (`Columns`) of the tensor that comes as its context
    from then on, and raises for any other. An entry serves only the very tensor it was made from, and only while
    neither that nor the weights have changed since (by torch's version counters), so none can be stale.

    Args:
        attentions: the cross-attentions of one network, whose contexts have one width.
        capacity: how many encoded prompts are kept, those used last; 0 keeps none.
    """

    def __init__(self, attentions: Sequence[DirectAttention], capacity: int) -> None:
        projections = [attention.joint for attention in attentions]
        # Ordinary tensors, whose versions are counted, even if the engine is made in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._weight = torch.cat([projection.weight for projection in projections]).detach()
            self._bias = self._join_biases(projections)
        self._capacity = capacity
        self._entries: OrderedDict[int, tuple[Tensor, tuple, Shared]] = OrderedDict()
        self._lock = threading.Lock()
        self._columns = []
        total, start = len(self._weight), 0
        for attention, projection in zip(attentions, projections):
            end = start + len(projection.weight)
            self._columns.append(slice(start, end))
            attention.joint = Columns(start, end, total)
            start = end

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def width(self) -> int:
        """Values per token: the keys and values of all attentions."""
        return len(self._weight)

    def __call__(self, contexts: Sequence[Tensor]) -> Tensor:
        """(B, tokens, width) from B encoded prompts (1, tokens, D), each projected alone."""
        distinct = {id(context): context for context in contexts}
        projected = {key: self._project(context) for key, context in distinct.items()}
        return projected[id(contexts[0])] if len(contexts) == 1 else torch.cat([projected[id(c)] for c in contexts])

    def replace(self, index: int, weight: Tensor, bias: Tensor | None = None) -> None:
        """New weights for the keys and values of one attention, in place: (2 * heads * D, D_context), and the bias.

        What was kept before is projected again when it is next asked for.
        """
        rows = self._columns[index]
        if weight.shape != self._weight[rows].shape:
            raise ValueError(f"weight: needs shape {tuple(self._weight[rows].shape)}, got {tuple(weight.shape)}")
        if (bias is None) != (self._bias is None):
            raise ValueError(f"bias: {'needed' if bias is None else 'these attentions have none'}")
        with torch.no_grad():
            self._weight[rows].copy_(weight)
            if bias is not None:
                self._bias[rows].copy_(bias)

    def clear(self) -> None:
        """Forget every prompt."""
        with self._lock:
            self._entries.clear()

    def _project(self, context: Tensor) -> Tensor:
        state = (_version(self._weight), _version(self._bias), _version(context))
        with self._lock:
            # The entry keeps its context alive, so that no other tensor can come to have its identity.
            _, made_in, projected = self._entries.get(id(context), (None, None, None))
            if made_in == state:
                self._entries.move_to_end(id(context))
                return projected.get()
        projected = F.linear(context, self._weight, self._bias)
        if self._capacity:
            with self._lock:
                self._entries[id(context)] = (context, state, Shared(projected))
                self._entries.move_to_end(id(context))
                if len(self._entries) > self._capacity:
                    self._entries.popitem(last=False)
        return projected

    @staticmethod
    def _join_biases(projections: Sequence[torch.nn.Module]) -> Tensor | None:
        if all(projection.bias is None for projection in projections):
            return None
        return torch.cat(
            [
                projection.weight.new_zeros(len(projection.weight)) if projection.bias is None else projection.bias
                for projection in projections
            ]
        ).detach()


class Columns(torch.nn.Module):
    """The keys and values of one attention out of those of all."""

    def __init__(self, start: int, end: int, total: int) -> None:
        super().__init__()
        self.start, self.end, self.total = start, end, total

    def forward(self, projected: Tensor) -> Tensor:
        """(B, tokens, 2 * heads * D), a view of (B, tokens, total)."""
        if projected.shape[-1] != self.total:
            raise ValueError(
                f"this cross-attention reads {self.total} projected values per token (CrossAttentionCache), "
                f"got {projected.shape[-1]}"
            )
        return projected[..., self.start : self.end]


def _version(tensor: Tensor | None) -> int | None:
    """How often it was changed in place; None where torch does not count (made in inference mode, where the engine
    encodes prompts and never writes to them)."""
    return None if tensor is None or tensor.is_inference() else tensor._version
