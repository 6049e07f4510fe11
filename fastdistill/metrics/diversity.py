"""Whether samples of one class differ from each other as much as real ones do."""

from __future__ import annotations

import torch
from torch import Tensor

from ._features import Features, as_labels, as_pair

_ROWS_AT_ONCE = 1024


def diversity(fake: Features, fake_labels: Features, real: Features, real_labels: Features) -> Tensor:
    """Per class, mean Euclidean distance over all pairs of fake samples, over that of real ones; 1 is as the data.

    0 is a collapse to one sample per class. Above 1 is no merit: noise is diverse.

    Args:
        fake: (M, D), tensor or array. fake_labels: (M,) integers, the wanted classes.
        real: (N, D). real_labels: (N,) integers; every class in it needs two or more samples in both sets.

    Returns:
        (classes,) float64 on the CPU, classes in rising order.

    Raises:
        TypeError, ValueError: not feature matrices of one width, labels that do not fit, a class with fewer than two
            samples, a class of `fake_labels` that real data do not have, a class of equal real samples.
    """
    fake, real = as_pair(("fake", "real"), fake, real)
    fake_labels = as_labels("fake_labels", fake_labels, len(fake))
    real_labels = as_labels("real_labels", real_labels, len(real))
    classes = real_labels.unique()
    unknown = fake_labels[~torch.isin(fake_labels, classes)]
    if len(unknown):
        raise ValueError(f"fake_labels: class {int(unknown[0])} is not among real_labels")
    ratios = []
    for label in classes.tolist():
        real_spread = _spread("real_labels", real, real_labels, label)
        if real_spread == 0:
            raise ValueError(f"real: all samples of class {label} are equal, so there is no diversity to compare with")
        ratios.append(_spread("fake_labels", fake, fake_labels, label) / real_spread)
    return torch.tensor(ratios, dtype=torch.float64)


def _spread(name: str, features: Tensor, labels: Tensor, label: int) -> float:
    """Mean distance over all pairs of different rows of one class."""
    same = features[(labels == label).to(features.device)]
    if len(same) < 2:
        raise ValueError(f"{name}: {len(same)} samples of class {label}; diversity needs at least 2 of each")
    exact = "donot_use_mm_for_euclid_dist"  # 0 for equal rows
    total = sum(float(torch.cdist(rows, same, compute_mode=exact).sum()) for rows in same.split(_ROWS_AT_ONCE))
    return total / (len(same) * (len(same) - 1))
