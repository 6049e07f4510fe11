"""Random numbers of a training run: a function of the seed and of the place in the run, and of nothing else.

So a resumed run needs no generator's state, and n processes draw together what one with the whole batch would.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class Draws:
    """The numbers of one place in a run; each call gives the next ones.

    They come from the CPU whatever the device: one seed, one run.

    Args:
        key: what names the place: seed, iteration, micro-batch, turn …
        batch_size: samples B of this process.
        device: of what is drawn.
        rank, world: the processes draw for `world * batch_size` samples, and each keeps its own.
    """

    def __init__(
        self,
        *key: int | str,
        batch_size: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.batch_size, self.device = batch_size, torch.device(device)
        self._key, self._rank, self._world = key, rank, world
        digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))

    def fork(self, name: str, device: torch.device | str | None = None) -> Draws:
        """Numbers of their own for a part of the work, whatever else is drawn; on the same device unless given."""
        device = self.device if device is None else device
        return Draws(*self._key, name, batch_size=self.batch_size, device=device, rank=self._rank, world=self._world)

    def randn(self, *shape: int) -> Tensor:
        """(B, *shape) float32, standard normal."""
        return self._own(torch.randn(self.whole_batch, *shape, generator=self._generator))

    def rand(self, *shape: int) -> Tensor:
        """(B, *shape) float32, uniform in [0, 1)."""
        return self._own(torch.rand(self.whole_batch, *shape, generator=self._generator))

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        """(B, *shape) int64, uniform in low … high - 1."""
        return self._own(torch.randint(low, high, (self.whole_batch, *shape), generator=self._generator))

    def shared(self, low: int, high: int) -> int:
        """One integer in low … high - 1 for the whole batch of all processes."""
        return int(torch.randint(low, high, (), generator=self._generator))

    def first_of(self, first: int) -> int:
        """The place of this process's first sample, where the whole batch begins at `first`."""
        return first + self._rank * self.batch_size

    @property
    def whole_batch(self) -> int:
        """Samples of the whole batch, over all processes."""
        return self.batch_size * self._world

    def _own(self, of_all: Tensor) -> Tensor:
        first = self._rank * self.batch_size
        return of_all[first : first + self.batch_size].to(self.device)
