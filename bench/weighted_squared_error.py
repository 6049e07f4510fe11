"""weighted_squared_error against the loss as one writes it: ADD's weighted distance, and a v prediction's Min-SNR loss.

Targets and weights receive no gradient, in either.
"""

from __future__ import annotations

import math

import torch

from fastdistill import diffusion
from fastdistill.ops import weighted_squared_error

from . import providers
from .benchmark import Benchmark, Case, Inputs, cases
from .roofline import Cost

OP = "weighted_squared_error"

# With the batch: latents at 512 and 1024 px, pixels at 512 px (ADD), 5 latent frames of a video.
SITES = {
    "latents": ((8, 4, 64, 64), (4, 4, 128, 128)),
    "pixels": ((2, 3, 512, 512), (4, 3, 512, 512)),
    "video": ((1, 16, 5, 60, 90),),
}
# Besides ADD: as in a training step under autocast, a prediction of the row's dtype, float32 data and noise.
VELOCITY = "velocity"

# Per element: difference and square and their sum; difference and factor. A scaled target more costs two.
_FLOPS = {"forward": 4, "backward": 3}


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """Forward reads x and its targets, backward the same and writes x's gradient."""
    size, velocity = math.prod(case.shape), case.variant == VELOCITY
    read = dtype.itemsize + (2 * 4 if velocity else dtype.itemsize)
    bytes_of = {"forward": read * size, "backward": (read + dtype.itemsize) * size}
    passes = ("forward", "backward") if mode == "full" else (mode,)
    flops = sum(_FLOPS[each] + 4 * velocity for each in passes) * size
    return Cost(sum(bytes_of[each] for each in passes), flops)


def setup(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> Inputs:
    """Samples of unit size, timesteps over the whole schedule. What receives no gradient is among the constants.

    The loss's own gradient is the number of elements, so that x's is of unit size and its error is seen.
    """
    batch = case.shape[0]
    tensors = {"x": torch.randn(case.shape, device=device).to(dtype)}
    gradients = {"loss": torch.tensor(float(math.prod(case.shape)), device=device)}
    alpha, sigma = diffusion.scaled_linear().to(device).at(torch.randint(0, 1000, (batch,), device=device))
    if case.variant != VELOCITY:
        a = torch.randn(case.shape, device=device).to(dtype)
        return Inputs(tensors, gradients, {"a": a, "weight": alpha})
    weight = diffusion.snr_weight(alpha, sigma, "v_prediction", gamma=5.0)
    data, noise = torch.randn((2, *case.shape), device=device)
    constants = {"a": data, "b": noise, "scale_a": -sigma, "scale_b": alpha, "weight": weight}
    return Inputs(tensors, gradients, constants)


def eager(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor | None = None,
    *,
    weight: torch.Tensor,
    scale_a: torch.Tensor | None = None,
    scale_b: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a training script writes: float32 from the difference on, because 16-bit squares overflow."""
    per_sample = (-1, *(1,) * (x.dim() - 1))
    wide = torch.promote_types(x.dtype, torch.float32)
    target = a.to(wide) if b is None else scale_a.view(per_sample) * a.to(wide) + scale_b.view(per_sample) * b
    distances = torch.nn.functional.mse_loss(x.to(wide), target, reduction="none")
    return (distances.mean(dim=tuple(range(1, x.dim()))) * weight).mean()


_TORCH = providers.eager("torch", eager)

BENCHMARK = Benchmark(
    op=OP,
    cases=cases(SITES, ("", VELOCITY)),
    layouts=("contiguous",),
    setup=setup,
    cost=cost,
    baseline=_TORCH,
    providers=(
        *providers.backends(OP, weighted_squared_error),
        _TORCH,  # against itself: how far two identical functions scatter here
        providers.compiled("torch.compile", eager),
    ),
    default=providers.kernel_names(OP),
)
