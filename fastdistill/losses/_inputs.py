"""The checks that losses over samples have in common, in the words of the ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_samples(**samples: Tensor) -> None:
    """Floating-point tensors (B, ...), all of the first one's shape and on its device."""
    first_name, first = next(iter(samples.items()))
    for name, t in samples.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {t.dtype}")
        if t.dim() < 1:
            raise ValueError(f"{name}: expected (B, ...), got a tensor of no dimensions")
        if t.shape != first.shape:
            raise ValueError(f"{name}: expected {first_name}'s shape {tuple(first.shape)}, got {tuple(t.shape)}")
        if t.device != first.device:
            raise ValueError(f"{name}: expected on {first_name}'s device {first.device}, got {t.device}")


def check_per_sample(x: Tensor, **values: Tensor | float) -> None:
    """Finite numbers, or tensors () or (B,) on x's device."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.dim() != 0 and value.shape != x.shape[:1]:
                raise ValueError(
                    f"{name}: expected shape () or ({x.shape[0]},), one per sample, got {tuple(value.shape)}"
                )
            if value.device != x.device:
                raise ValueError(f"{name}: expected on the samples' device {x.device}, got {value.device}")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
        elif not -math.inf < value < math.inf:  # `isfinite` cannot be traced
            raise ValueError(f"{name}: expected a finite number, got {value}")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def over_samples(value: Tensor | float, x: Tensor, dtype: torch.dtype) -> Tensor | float:
    """`value` so that it broadcasts over the batch of x."""
    return value.to(dtype).reshape(-1, *(1,) * (x.dim() - 1)) if isinstance(value, Tensor) else value
