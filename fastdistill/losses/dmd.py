"""Distribution matching: the gradient that moves one-step samples from the fake distribution to the real one.

Yin et al., "One-step Diffusion with Distribution Matching Distillation", arXiv 2311.18828, equations 7 and 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill import diffusion

NORMALISER_BOUND = 1e-6  # below it x equals the teacher's prediction: nothing to divide by, and nothing to learn


class DMDStats(NamedTuple):
    """What a training log needs, as tensors on the inputs' device (reading them is the caller's choice to wait).

    Attributes:
        grad_abs_mean: () mean of |gradient| over all elements, after the guard.
        normaliser: (B,) mean of |x - mu_real| per sample, before the guard.
        guarded: () int64, elements whose gradient was set to zero by the guard.
    """

    grad_abs_mean: Tensor
    normaliser: Tensor
    guarded: Tensor


def dmd_loss(
    x: Tensor,
    x_t: Tensor,
    pred_real: Tensor,
    pred_fake: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    *,
    pred_real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    prediction_type: str = "epsilon",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, DMDStats]:
    """The loss `0.5 * mse(x, stop_gradient(x - g))` with g from `dmd_gradient`.

    Its value is `0.5 * mean(g^2)`, its gradient in x is `g / x.numel()` exactly: neither goes through the rounding of
    `x - (x - g)`. Nothing but x receives a gradient, and it is differentiable once.

    Args:
        x: (B, ...) the student's sample of the data, floating point, any number of further dimensions.
        x_t: (B, ...) x noised, `alpha * x + sigma * noise`, as both networks saw it.
        pred_real, pred_fake: (B, ...) raw outputs of the teacher (with the condition) and of the fake score at x_t.
        alpha, sigma: float, () or (B,), of the timestep of each sample.
        pred_real_uncond: (B, ...) the teacher's raw output without the condition, needed for `guidance_scale != 1`.
        guidance_scale: raw w of `uncond + w * (cond - uncond)`, teacher only; the fake score is never guided.
        prediction_type: of both networks, one of `fastdistill.diffusion.PREDICTION_TYPES`.
        return_stats: also return a `DMDStats`.

    Returns:
        A scalar, float32 (float64 for float64 inputs), or (scalar, stats). An empty batch gives 0.

    Raises:
        ValueError: shapes that differ, an unknown prediction type, guidance without `pred_real_uncond`, or epsilon
            at alpha = 0 (see `fastdistill.diffusion.convert`).
    """
    gradient, stats = _guarded_gradient(
        x, x_t, pred_real, pred_fake, alpha, sigma, pred_real_uncond, guidance_scale, prediction_type
    )
    loss = _HalfSquareWithGradient.apply(x, gradient)
    return (loss, stats) if return_stats else loss


def dmd_gradient(
    x: Tensor,
    x_t: Tensor,
    pred_real: Tensor,
    pred_fake: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    *,
    pred_real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    prediction_type: str = "epsilon",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, DMDStats]:
    """`g = (mu_fake - mu_real) / mean|x - mu_real|`, the mean taken over each sample; arguments as in `dmd_loss`.

    This is the paper's gradient with its weight put in and the remaining factor alpha dropped, as all public code does.
    A sample whose normaliser is below 1e-6 or not finite, and any element that is not finite, gets 0 and is counted.

    Returns:
        (B, ...) float32 (float64 for float64 inputs) without a graph, or (gradient, stats).
    """
    gradient, stats = _guarded_gradient(
        x, x_t, pred_real, pred_fake, alpha, sigma, pred_real_uncond, guidance_scale, prediction_type
    )
    return (gradient, stats) if return_stats else gradient


@torch.no_grad()
def _guarded_gradient(
    x: Tensor,
    x_t: Tensor,
    pred_real: Tensor,
    pred_fake: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    pred_real_uncond: Tensor | None,
    guidance_scale: float,
    prediction_type: str,
) -> tuple[Tensor, DMDStats]:
    inputs = {"x_t": x_t, "pred_real": pred_real, "pred_fake": pred_fake}
    if pred_real_uncond is not None:
        inputs["pred_real_uncond"] = pred_real_uncond
    elif guidance_scale != 1:
        raise ValueError(f"guidance_scale {guidance_scale} needs pred_real_uncond, the teacher without the condition")
    _check_shapes(x, inputs)

    dtype = torch.float64 if any(value.dtype == torch.float64 for value in (x, *inputs.values())) else torch.float32
    x, x_t, pred_real, pred_fake = (value.to(dtype) for value in (x, x_t, pred_real, pred_fake))
    if pred_real_uncond is not None:
        pred_real = diffusion.guide(pred_real_uncond.to(dtype), pred_real, guidance_scale)
    mu_real = diffusion.to_data(pred_real, x_t, alpha, sigma, prediction_type)
    mu_fake = diffusion.to_data(pred_fake, x_t, alpha, sigma, prediction_type)

    # The paper's p_real - p_fake = (x - mu_real) - (x - mu_fake), without the rounding of the two x that cancel.
    per_sample = (x.shape[0], *(1,) * (x.ndim - 1))
    normaliser = (x - mu_real).abs().flatten(1).mean(dim=1)
    gradient = (mu_fake - mu_real) / normaliser.clamp(min=NORMALISER_BOUND).reshape(per_sample)
    usable = ((normaliser >= NORMALISER_BOUND) & normaliser.isfinite()).reshape(per_sample) & gradient.isfinite()
    gradient = torch.where(usable, gradient, 0.0)
    stats = DMDStats(gradient.abs().sum() / max(gradient.numel(), 1), normaliser, (~usable).sum())
    return gradient, stats


class _HalfSquareWithGradient(torch.autograd.Function):
    """Value `0.5 * mean(g^2)`, gradient in x `g / numel`: half the squared distance from x to the constant x - g."""

    @staticmethod
    def forward(ctx, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return 0.5 * gradient.square().sum() / max(gradient.numel(), 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (grad_loss * gradient / max(gradient.numel(), 1)).to(ctx.dtype), None


def _check_shapes(x: Tensor, inputs: dict[str, Tensor]) -> None:
    for name, value in {"x": x, **inputs}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
        if not value.is_floating_point():
            raise ValueError(f"{name} must be floating point; got {value.dtype}")
        if value.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}; got {tuple(value.shape)}")
    if x.ndim < 2:
        raise ValueError(f"x must be (B, ...) with at least one dimension per sample; got {tuple(x.shape)}")
