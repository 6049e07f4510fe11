"""The error of a result against float64, and how much of it is allowed.

A result may be off by twice what PyTorch itself is off by in the same dtype, plus a rounding floor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

# Of the largest exact value. 16-bit: half an eps, what one rounding of an exact result costs.
_FLOOR = {
    torch.float32: 2e-6,
    torch.float16: torch.finfo(torch.float16).eps / 2,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2,
}
# float32 with |mean| > 10 std: the subtraction of the mean alone costs more digits.
_FLOOR_LARGE_MEAN = 1e-5


@dataclass(frozen=True)
class Accuracy:
    """The result that is nearest to its limit: largest |error| of ours and of the baseline, and what is allowed."""

    result: str
    error: float
    baseline_error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # false for NaN

    @property
    def share(self) -> float:
        """Of what is allowed; infinite for NaN, which is worse than any number."""
        return self.error / self.allowed if self.error == self.error else float("inf")


def allowed_error(baseline_error: float, largest: float, dtype: torch.dtype, *, large_mean: bool = False) -> float:
    """2 x the baseline's error + floor * max(1, largest |exact value|). `large_mean`: |mean| > 10 std in the input."""
    floor = _FLOOR_LARGE_MEAN if large_mean and dtype == torch.float32 else _FLOOR[dtype]
    return 2 * baseline_error + floor * max(1.0, largest)


def compare(
    ours: Mapping[str, torch.Tensor],
    baseline: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> Accuracy:
    """Over results by name; `dtype` is the one they were computed in."""
    return worst(each(ours, baseline, exact, dtype))


def each(
    ours: Mapping[str, torch.Tensor],
    baseline: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> tuple[Accuracy, ...]:
    """Like `compare`, of every result."""
    return tuple(_compare(name, ours[name], baseline[name], exact[name], dtype) for name in exact)


def worst(found: Iterable[Accuracy]) -> Accuracy:
    """The one that is nearest to its limit."""
    return max(found, key=lambda accuracy: accuracy.share)


def _compare(
    name: str, ours: torch.Tensor, baseline: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype
) -> Accuracy:
    baseline_error = _largest(baseline.double() - exact)
    return Accuracy(
        name,
        _largest(ours.double() - exact),
        baseline_error,
        allowed_error(baseline_error, _largest(exact), dtype),
    )


def _largest(t: torch.Tensor) -> float:
    return t.abs().max().item()
