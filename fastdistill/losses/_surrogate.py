"""A loss whose gradient is given: half the squared distance from x to the constant x - gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def half_square_with_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Value `0.5 * mean(gradient^2)`, gradient in x `gradient / numel`, neither through the rounding of x - gradient.

    gradient: of x's shape, float32 or float64, without a graph. An empty x gives 0.
    """
    return _HalfSquareWithGradient.apply(x, gradient)


class _HalfSquareWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return 0.5 * gradient.square().sum() / max(gradient.numel(), 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * (grad_loss / max(gradient.numel(), 1))).to(ctx.dtype), None
