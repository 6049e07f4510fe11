"""The sliced Wasserstein distance: the mean over random directions of the exact distance in one dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from ._features import Features, as_pair

_DIRECTIONS_AT_ONCE = 64  # bounds the memory to so many numbers per sample


def sliced_wasserstein(a: Features, b: Features, projections: int = 512, *, p: float = 2, seed: int = 0) -> float:
    """`(mean over unit directions of W_p(a . direction, b . direction)^p)^(1/p)`, in units of the features; 0 is best.

    (Bonneel et al. 2015; Rabin et al. 2011.) In one dimension W_p is the L_p distance of the quantile functions, which
    is exact for any two numbers of samples. Two sets of one distribution have a distance of the order of `1/sqrt(N)`,
    not 0. A shift by s gives about `|s| / sqrt(D)`.

    Args:
        a: (N, D), tensor or array. b: (M, D). N and M may differ.
        projections: random directions, uniform on the sphere, drawn on the CPU: the same for every device.
        p: order, 1 or more.
        seed: of the directions; fix it when distances are compared.

    Raises:
        TypeError, ValueError: not feature matrices of one width, empty, values that are not finite, `projections` or
            `p` below 1.
    """
    if projections < 1:
        raise ValueError(f"projections={projections}: needed 1 or more")
    if not 1 <= p < float("inf"):
        raise ValueError(f"p={p}: needed a finite order of 1 or more")
    a, b = as_pair(("a", "b"), a, b)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(projections, a.shape[1], dtype=torch.float64, generator=generator).to(a.device)
    directions /= directions.norm(dim=1, keepdim=True)
    in_a, in_b, weights = _quantile_steps(len(a), len(b), a.device)
    total = 0.0
    for some in directions.split(_DIRECTIONS_AT_ONCE):
        sorted_a, sorted_b = ((some @ samples.T).sort(dim=1).values for samples in (a, b))
        total += float(((sorted_a[:, in_a] - sorted_b[:, in_b]).abs() ** p @ weights).sum())
    return (total / projections) ** (1 / p)


def _quantile_steps(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where both quantile functions are constant: the index into n sorted values, into m, and the length, of each step.

    In units of 1 / (n m) every edge is an integer.
    """
    edges = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    weights = edges.diff(prepend=torch.zeros(1, dtype=edges.dtype)).double() / (n * m)
    return ((edges - 1) // m).to(device), ((edges - 1) // n).to(device), weights.to(device)
