"""LayerNorm over the last dimension in Triton, with an optional residual sum in front of it.

Ba, Kiros and Hinton, "Layer Normalization" (2016), arXiv 1607.06450.

- tiles.py: which tile serves a problem, with the reasons;
- forward.py, backward.py: the kernels, and the plan of their launches;
- specialisations.py: the compiled versions that the ahead-of-time gate checks.

docs/kernels.md explains the design.
"""

from __future__ import annotations

import torch

from ..launch import run_all
from .backward import plan_backward
from .forward import plan_forward
from .specialisations import specialisations

__all__ = ["layer_norm", "layer_norm_backward", "specialisations"]


def layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm of s = x (+ residual, rounded to x's dtype), computed in float32 and rounded once.

    The caller has checked the arguments; nothing is checked here.

    Args:
        x: (..., D), float32, float16 or bfloat16, with at least one row. Rows are dense, at any one stride >= D. On a
            CUDA device, or on the CPU when the process runs Triton's interpreter (TRITON_INTERPRET=1).
        residual: like x, its rows at any one stride; or None.
        weight, bias: (D,) in x's dtype or float32, any stride, or None for 1 and 0.
        eps: added to the variance before its square root.

    Returns:
        y and s with x's dtype and the strides of `torch.empty_like(x)` (s has no elements without a residual); mean and
        1 / sqrt(biased variance + eps) of each row, float32.
    """
    launches, outputs = plan_forward(x, residual, weight, bias, eps)
    run_all(launches, x.device)
    return outputs


def layer_norm_backward(
    grad_y: torch.Tensor,
    grad_s: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    parameters: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `layer_norm` for s (and so for x and residual), weight and bias.

    Args:
        grad_y, grad_s: like s, each with dense rows at any one stride (0 where one row was expanded); grad_s may be
            None for 0.
        s: what was normalised, x or x + residual.
        mean, rstd: one float32 value per row, as `layer_norm` returned them.
        parameters: whether the gradients of weight and bias are computed.

    Returns:
        grad_s with the gradient through the norm added, in s's dtype and the strides of `torch.empty_like(s)`;
        grad_weight and grad_bias (D,) float32, without elements unless `parameters`.
    """
    launches, outputs = plan_backward(grad_y, grad_s, s, weight, mean, rstd, parameters)
    run_all(launches, s.device)
    return outputs
