"""Distribution matching: the loss that moves one-step samples from the fake distribution to the real one.

Yin et al., "One-step Diffusion with Distribution Matching Distillation", arXiv 2311.18828, equations 7 and 8.
"""

from __future__ import annotations

from torch import Tensor

from fastdistill.ops.dmd_gradient import DMDStats, dmd_gradient, half_square

__all__ = ["DMDStats", "dmd_gradient", "dmd_loss"]


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, DMDStats]:
    """The loss `0.5 * mse(x, stop_gradient(x - g))`, with g from `dmd_gradient` (arXiv 2311.18828, equations 7 and 8).

    Its value is `0.5 * mean(g^2)`, its gradient in x is `g / x.numel()`: neither goes through the rounding of
    `x - (x - g)`. Nothing but x receives a gradient, and it is differentiable once. One op forward and one backward
    ("triton" launches two or three kernels forward); between them g / numel is kept, in float32. Arithmetic is float32,
    under autocast too.

    Args:
        x: (B, ...) the student's sample of the data, floating point, any number of further dimensions.
        x_t: (B, ...) x noised, `alpha * x + sigma * noise`, as both networks saw it.
        pred_real, pred_fake: (B, ...) raw outputs of the teacher (with the condition) and of the fake score at x_t.
            16-bit predictions may go with a float32 x and x_t, as autocast leaves them.
        alpha, sigma: float, () or (B,), of the timestep of each sample.
        pred_real_uncond: (B, ...) the teacher's raw output without the condition, needed for `guidance_scale != 1`.
        guidance_scale: raw w of `uncond + w * (cond - uncond)`, teacher only; the fake score is never guided.
        prediction_type: of both networks, one of `fastdistill.diffusion.PREDICTION_TYPES`.
        return_stats: also return a `DMDStats`.
        backend: as in `dmd_gradient`, which also says what the kernels read in place.

    Returns:
        A scalar, float32 (float64 for float64 inputs), or (scalar, stats). An empty batch gives 0.

    Raises:
        ValueError, TypeError, BackendError: as `dmd_gradient`. Epsilon at alpha = 0 raises for floats and CPU tensors;
            a CUDA tensor is not waited for, and such a sample is guarded instead.
    """
    return half_square(
        x,
        x_t,
        pred_real,
        pred_fake,
        alpha,
        sigma,
        pred_real_uncond=pred_real_uncond,
        guidance_scale=guidance_scale,
        prediction_type=prediction_type,
        return_stats=return_stats,
        backend=backend,
    )
