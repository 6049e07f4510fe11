"""Which images a batch holds: a function of its number alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data import shuffled


class Plan:
    """Batches of one bucket each, in an order of its own every epoch.

    Every bucket is an endless stream that shows each of its images once before any of them twice. An epoch takes from
    each stream as many whole batches as it has become due: what is left of a bucket comes first in the next epoch, so
    that no image is left out, and each comes equally often whatever its bucket.

    Args:
        members: of each bucket, (n,) int64, the numbers of its images; n may be 0.
        seed: of the order.
    """

    def __init__(self, members: Sequence[Tensor], seed: int = 0) -> None:
        self.members, self.seed = members, seed

    def batch(self, number: int, size: int) -> tuple[int, Tensor]:
        """The bucket of the batch `number`, counted from 0, and its `size` images.

        Every batch of a run must be asked for with the same `size`: it decides what the numbers mean.
        """
        epoch = number * size // sum(map(len, self.members))
        while self._before(epoch + 1, size) <= number:
            epoch += 1
        due = [self._due(len(m), epoch + 1, size) - self._due(len(m), epoch, size) for m in self.members]
        order = torch.repeat_interleave(torch.tensor(due))
        if len(self.members) > 1:
            generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + epoch)
            order = order[torch.randperm(len(order), generator=generator)]
        place = number - self._before(epoch, size)
        bucket = int(order[place])
        members = self.members[bucket]
        earlier = self._due(len(members), epoch, size) + int((order[:place] == bucket).sum())
        return bucket, members[shuffled(earlier * size, size, len(members), self.seed + bucket)]

    def _before(self, epoch: int, size: int) -> int:
        return sum(self._due(len(members), epoch, size) for members in self.members)

    @staticmethod
    def _due(length: int, epochs: int, size: int) -> int:
        """Whole batches in so many epochs of a bucket of this length."""
        return epochs * length // size
