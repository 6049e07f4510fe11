"""Precision and recall over manifolds of k-nearest-neighbour balls (Kynkaanniemi et al., arXiv 1904.06991)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._features import Features, as_pair


class PrecisionRecall(NamedTuple):
    """`precision`: share of fake samples among the real ones; `recall`: share of real samples among the fake ones."""

    precision: float
    recall: float


def precision_recall(real: Features, fake: Features, k: int = 3, *, rows: int = 1024) -> PrecisionRecall:
    """Fidelity and coverage of `fake` (M, D) against `real` (N, D), both in [0, 1], 1 is best.

    A sample counts as covered by a set when it lies in at least one ball around a member of that set; the radius of a
    ball is the distance from its centre to the k-th nearest other member. Euclidean, float64.

    Args:
        real, fake: tensors or arrays, k + 1 rows or more. The paper uses 50000 VGG features of each; balls grow as
            samples get fewer, so compare equal numbers only.
        k: neighbours, 3 in the paper.
        rows: distances are computed for so many rows at a time: the memory is `rows * max(N, M)` numbers.

    Raises:
        TypeError, ValueError: not feature matrices of one width, too few rows, values that are not finite, or `k` or
            `rows` below 1.
    """
    for name, value in (("k", k), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name}={value}: needed 1 or more")
    real, fake = as_pair(("real", "fake"), real, fake, at_least=k + 1)
    centre = real.mean(dim=0)  # squared distances through products lose the digits of a common offset
    real, fake = real - centre, fake - centre
    # Samples that are equal, or just on a sphere, stay so after rounding.
    slack = 8 * torch.finfo(torch.float64).eps * float(_norms(torch.cat([real, fake])).max())
    return PrecisionRecall(_covered(fake, real, k, slack, rows), _covered(real, fake, k, slack, rows))


def _covered(points: Tensor, members: Tensor, k: int, slack: float, rows: int) -> float:
    """Share of `points` in at least one ball around `members`."""
    radii = torch.cat([_squared_distances(part, members).kthvalue(k + 1).values for part in members.split(rows)])
    inside = [(_squared_distances(part, members) <= radii + slack).any(dim=1) for part in points.split(rows)]
    return float(torch.cat(inside).double().mean())


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (_norms(a)[:, None] + _norms(b) - 2 * a @ b.T).clamp(min=0)


def _norms(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=1)
