"""Feature matrices as every metric reads them: float64, finite, one row per sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Features = Tensor | np.ndarray
"""(N, D) one row per sample, any real dtype, any device."""


def as_tensor(value: Features) -> Tensor:
    """Without a graph; of an array a copy, which may be read-only or reversed, as no tensor can be."""
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value.detach()


def as_features(name: str, value: Features, at_least: int = 1) -> Tensor:
    """`value` (N, D) as float64 without a graph, on its own device where that has float64, else on the CPU.

    Raises:
        TypeError: `value` is neither a tensor nor an array, or is complex or boolean.
        ValueError: not two dimensions, no columns, fewer than `at_least` rows, or values that are not finite.
    """
    if not isinstance(value, Tensor | np.ndarray):
        raise TypeError(f"{name}: {type(value).__name__}; needed a torch tensor or a numpy array (N, D)")
    tensor = as_tensor(value)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: dtype {tensor.dtype}; needed real numbers")
    if tensor.ndim != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; needed (N, D), one row per sample")
    if len(tensor) < at_least:
        raise ValueError(f"{name}: {len(tensor)} samples; needed {at_least} or more")
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    tensor = tensor.double()
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: some values are not finite")
    return tensor


def as_pair(names: tuple[str, str], a: Features, b: Features, at_least: int = 1) -> tuple[Tensor, Tensor]:
    """Both as `as_features`, of one width D and on the device of `a`."""
    first, second = as_features(names[0], a, at_least), as_features(names[1], b, at_least)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{names[0]}, {names[1]}: {first.shape[1]} and {second.shape[1]} features per sample; needed the same"
        )
    return first, second.to(first.device)


def as_labels(name: str, value: Features, count: int) -> Tensor:
    """`value` (count,) integers, as int64 on the CPU."""
    if not isinstance(value, Tensor | np.ndarray):
        raise TypeError(f"{name}: {type(value).__name__}; needed a torch tensor or a numpy array (N,)")
    labels = as_tensor(value)
    if labels.shape != (count,):
        raise ValueError(f"{name}: shape {tuple(labels.shape)}; needed ({count},), one per sample")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name}: dtype {labels.dtype}; needed integers")
    return labels.cpu().long()
