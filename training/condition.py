"""What a network is told beside the noisy sample and its timestep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Of a batch of samples, or of a list of prompts.

    Attributes:
        states: (B, L, D) the text encoder's states, which cross-attention reads.
        pooled: (B, P) the pooled text embedding; None where there is none. SDXL's UNet adds it to the timestep, and
            ADD's discriminator is conditioned on it.
        time_ids: (B, 6) SDXL's sizes: original height and width, crop top and left, target height and width, in
            pixels. None for networks that take none.
    """

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: Tensor | slice | list[int]) -> Condition:
        return self.map(lambda t: t[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """`function` of every tensor that is there."""
        return Condition(*(None if t is None else function(t) for t in self._tensors()))

    def to(self, *args, **kwargs) -> Condition:
        """Every tensor elsewhere, or in another dtype: arguments of `torch.Tensor.to`."""
        return self.map(lambda t: t.to(*args, **kwargs))

    def expand(self, count: int) -> Condition:
        """A condition of one sample, for `count` of them."""
        return self.map(lambda t: t.expand(count, *t.shape[1:]))

    def where(self, mask: Tensor, other: Condition) -> Condition:
        """This condition where `mask` (B,) bool is true, else `other`, of B samples or of one. Sizes are kept."""

        def choose(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if mine is None or theirs is None:
                return mine
            return torch.where(mask.reshape(-1, *(1,) * (mine.ndim - 1)), mine, theirs)

        return Condition(choose(self.states, other.states), choose(self.pooled, other.pooled), self.time_ids)

    def _tensors(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]


def cat(conditions: list[Condition]) -> Condition:
    """One after the other along the batch; all must have the same parts."""
    parts = zip(*(condition._tensors() for condition in conditions))
    return Condition(*(None if part[0] is None else torch.cat(part) for part in parts))
