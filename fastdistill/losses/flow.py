"""Rectified flow and reflow: interpolation, velocity matching, and how straight a flow has become.

Liu et al., "Flow Straight and Fast", arXiv 2209.03003; InstaFlow, 2309.06380; the other direction of time: Stable
Diffusion 3, 2403.03206.

Two conventions, the reverse of each other in time and sign (`fastdistill.diffusion.flow_ends`):

- "instaflow": x_t = t * data + (1 - t) * noise, velocity data - noise.
- "sd3": x_t = (1 - t) * data + t * noise, velocity noise - data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdistill import diffusion
from fastdistill.ops import weighted_squared_error

from ._inputs import check_per_sample, check_samples, compute_dtype, over_samples


def flow_interpolate(data: Tensor, noise: Tensor, t: Tensor | float, *, convention: str = "instaflow") -> Tensor:
    """The point of the straight path at time t, `start + t * (end - start)`: exactly start and end at t = 0 and 1.

    Args:
        data, noise: (B, ...) of one shape, floating point.
        t: float, () or (B,), within [0, 1].
        convention: "instaflow" or "sd3".

    Returns:
        (B, ...) in the promoted dtype of data and noise, computed in float32 (float64 where one is) and rounded once.

    Plain differentiable PyTorch: `torch.lerp`, which is a single launch in float32 and float64 already. 16-bit inputs
    take a conversion each and one of the result.

    Raises:
        ValueError, TypeError: bad input, by the name of the argument.
    """
    check_samples(data=data, noise=noise)
    check_per_sample(data, t=t)
    if not isinstance(t, Tensor) and not 0 <= t <= 1:
        raise ValueError(f"t: expected within [0, 1], got {t}")
    start, end = diffusion.flow_ends(data, noise, convention)
    dtype = compute_dtype(data, noise)
    between = torch.lerp(start.to(dtype), end.to(dtype), over_samples(t, data, dtype))
    return between.to(torch.promote_types(data.dtype, noise.dtype))


def flow_matching_loss(
    v_pred: Tensor,
    data: Tensor,
    noise: Tensor,
    *,
    convention: str = "instaflow",
    weight: Tensor | float | None = None,
) -> Tensor:
    """`mean over the batch of weight * mean over a sample of (v_pred - velocity)^2` (arXiv 2209.03003, eq. 1).

    Reflow is this loss on coupled pairs, noise and the data that the flow carries it to.

    Args:
        v_pred: (B, ...) the network's output at `flow_interpolate(data, noise, t)`; float32, float16, bfloat16 or
            float64. The only input that receives a gradient.
        data, noise: (B, ...) of the same shape and of one dtype (of two, plain PyTorch serves), v_pred's or another.
        convention: "instaflow" (velocity data - noise) or "sd3" (noise - data).
        weight: float, () or (B,); 1 unless given.

    Returns:
        () float32 (float64 where an input is). An empty batch gives 0.

    One op (`fastdistill.ops.weighted_squared_error`): the velocity is never written out. Nothing waits for the device.

    Raises:
        ValueError, TypeError: bad input, by the name of the argument.
    """
    check_samples(v_pred=v_pred, data=data, noise=noise)
    weight = 1.0 if weight is None else weight
    check_per_sample(v_pred, weight=weight)
    start, end = diffusion.flow_ends(data, noise, convention)
    return weighted_squared_error(v_pred, end, start, scale_b=-1.0, weight=weight)


@torch.no_grad()
def straightness(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int = 100, *, convention: str = "instaflow"
) -> Tensor:
    """`S = integral of E (Z_1 - Z_0 - v(Z_t, t))^2 dt` along the flow's own trajectory, the mean over elements.

    0 is straight (arXiv 2209.03003). Z_t is simulated from the noise by `steps` Euler steps, not interpolated: on the
    interpolation the same expression is the training loss. An Euler trajectory's displacement is the mean of its
    velocities, so S is their variance along it, which is kept up as they come: two tensors of noise's size besides the
    state, whatever the number of steps.

    Args:
        velocity: called as velocity(x, t) with x (B, ...) in noise's dtype and t (B,) float32 on noise's device;
            returns (B, ...), the velocity in `convention`, guidance included. A network of another path answers for
            the straight one through `fastdistill.diffusion.to_straight_path` and `convert`.
        noise: (B, ...) floating point.
        convention: "instaflow" (t runs from 0 to 1) or "sd3" (from 1 to 0).

    Returns:
        () float32 (float64 for float64 noise), without a graph. An empty batch gives 0.

    Raises:
        ValueError, TypeError: bad input, by the name of the argument; a velocity of another shape.
    """
    check_samples(noise=noise)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected an integer of 1 or more, got {steps!r}")
    noise_time = diffusion.noise_time(convention)
    step = (1.0 - 2.0 * noise_time) / steps  # of time, towards data
    dtype = compute_dtype(noise)
    z = noise.to(dtype)
    mean, total = torch.zeros_like(z), z.new_zeros(())
    for k in range(steps):
        t = torch.full(noise.shape[:1], noise_time + k * step, dtype=torch.float32, device=noise.device)
        v = velocity(z.to(noise.dtype), t)
        if v.shape != noise.shape:
            raise ValueError(f"velocity: expected to return shape {tuple(noise.shape)}, got {tuple(v.shape)}")
        v = v.to(dtype)
        difference = v - mean
        mean = mean + difference / (k + 1)
        total = total + (difference * (v - mean)).sum()
        z = z + step * v
    return total / (steps * max(noise.numel(), 1))
