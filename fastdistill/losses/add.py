"""Adversarial diffusion distillation's distance between the student's sample and the teacher's.

Sauer et al., "Adversarial Diffusion Distillation", arXiv 2311.17042: the distance in section 3, its weightings there
and in the ablation.
"""

from __future__ import annotations

from torch import Tensor

from fastdistill.ops import weighted_squared_error

from ._inputs import check_per_sample, check_samples


def add_distillation_loss(
    x_student: Tensor,
    x_teacher: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    *,
    weighting: str | Tensor = "exponential",
    sds_weight: Tensor | float | None = None,
) -> Tensor:
    """`mean over the batch of c * mean over a sample of (x_student - x_teacher)^2`, in latents or in pixels.

    x_teacher is the teacher's data prediction for x_student diffused to the timestep of (alpha, sigma),
    `diffusion.to_data(teacher(x_t, t), x_t, alpha, sigma, …)` with `x_t = diffusion.add_noise(x_student, noise, alpha,
    sigma)`, on the teacher's own schedule. The weighting c:

    - "exponential": alpha.
    - "sds": alpha * w / (2 * sigma). With it, in the space that is diffused, the gradient in x_student is score
      distillation's, `w * (eps_teacher - noise)`, over the number of elements of the batch.
    - a tensor (B,): itself.

    Args:
        x_student: (B, ...) float32, float16, bfloat16 or float64: the only input that receives a gradient.
        x_teacher: (B, ...) of the same shape, in any of these dtypes.
        alpha, sigma: float, () or (B,).
        sds_weight: w of "sds", a float, () or (B,); sigma^2 unless given. With a w of your own the weight is infinite
            at sigma = 0; with sigma^2 it is alpha * sigma / 2, which is 0 there.

    Returns:
        () float32 (float64 where a sample is). An empty batch gives 0.

    One op (`fastdistill.ops.weighted_squared_error`), whose docstring says what is launched, saved and read in place;
    "sds" adds two launches over (B,) elements, three with a `sds_weight`. Nothing waits for the device.

    Raises:
        ValueError, TypeError: bad input, by the name of the argument.
    """
    check_samples(x_student=x_student, x_teacher=x_teacher)
    check_per_sample(x_student, alpha=alpha, sigma=sigma)
    weight = _weight(x_student, alpha, sigma, weighting, sds_weight)
    return weighted_squared_error(x_student, x_teacher, weight=weight)


def _weight(x, alpha, sigma, weighting, sds_weight) -> Tensor | float:
    if sds_weight is not None and (isinstance(weighting, Tensor) or weighting != "sds"):
        raise ValueError('sds_weight: taken only with weighting="sds"')
    if isinstance(weighting, Tensor):
        check_per_sample(x, weighting=weighting)
        return weighting
    if weighting == "exponential":
        return alpha
    if weighting != "sds":
        raise ValueError(f"weighting: expected 'exponential', 'sds' or a tensor (B,), got {weighting!r}")
    if sds_weight is None:
        return 0.5 * alpha * sigma
    check_per_sample(x, sds_weight=sds_weight)
    if not isinstance(sigma, Tensor) and sigma == 0:
        raise ValueError("sigma: the weighting 'sds' is infinite at sigma = 0")
    return 0.5 * alpha * sds_weight / sigma
