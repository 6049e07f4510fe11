"""Noise-free score distillation: the teacher's direction without the noise that score distillation drags along.

Katzir et al., "Noise-Free Score Distillation", arXiv 2310.17590, and as one of ADD's distillation gradients in
arXiv 2311.17042.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._inputs import check_per_sample, check_samples, compute_dtype, over_samples
from ._surrogate import half_square_with_gradient

SMALL_NOISE = 200  # of 1000 timesteps: below it eps_uncond itself points towards the data's domain (2310.17590)


def nfsd_loss(
    x: Tensor,
    eps_cond: Tensor,
    eps_uncond: Tensor,
    eps_negative: Tensor,
    t: Tensor | int,
    weight: Tensor | float,
    scale: float = 7.5,
    *,
    small_noise: int = SMALL_NOISE,
) -> Tensor:
    """The loss whose gradient in x is `g / x.numel()` and whose value is `0.5 * mean(g^2)`, with

        g = weight * (delta_domain + scale * delta_condition)
        delta_condition = eps_cond - eps_uncond
        delta_domain = eps_uncond where t < small_noise, else eps_uncond - eps_negative

    Args:
        x: (B, ...) the student's latents, floating point: the only input that receives a gradient, once.
        eps_cond, eps_uncond, eps_negative: (B, ...) of x's shape, the teacher's noise predictions at timestep t of x
            diffused: with the prompt, with the empty one, and with the negative one ("unrealistic, blurry, …").
        t: (B,) integer timesteps, or an int, counted from the clean end.
        weight: w(t), a float, () or (B,).
        scale: s, the guidance scale.
        small_noise: the timestep below which eps_negative takes no part; the paper's 200 is of 1000.

    Returns:
        () float32 (float64 where an input is). An empty batch gives 0.

    Plain PyTorch, saving g alone. Nothing waits for the device.

    Raises:
        ValueError, TypeError: bad input, by the name of the argument.
    """
    check_samples(x=x, eps_cond=eps_cond, eps_uncond=eps_uncond, eps_negative=eps_negative)
    check_per_sample(x, t=t, weight=weight)
    if t.is_floating_point() if isinstance(t, Tensor) else not isinstance(t, int):
        raise TypeError(f"t: expected integer timesteps, got {t.dtype if isinstance(t, Tensor) else t!r}")
    with torch.no_grad():
        dtype = compute_dtype(x, eps_cond, eps_uncond, eps_negative)
        cond, uncond, negative = (eps.to(dtype) for eps in (eps_cond, eps_uncond, eps_negative))
        late = over_samples(t >= small_noise, x, dtype) if isinstance(t, Tensor) else float(t >= small_noise)
        gradient = (uncond - late * negative).add_(cond - uncond, alpha=scale).mul_(over_samples(weight, x, dtype))
    return half_square_with_gradient(x, gradient)
