"""dmd_gradient, as `dmd_loss` with its gradient, against the chain of a plain training loop.

Shapes have the batch in front: latents at 512 and 1024 px, pixels at 512 px, a video latent. Every input of a row has
its dtype but for alpha and sigma.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastdistill import diffusion
from fastdistill.losses import dmd_loss

from . import providers
from .benchmark import Benchmark, Case, Inputs, cases
from .roofline import Cost

OP = "dmd_gradient"

SITES = {
    "latents": ((1, 4, 64, 64), (2, 4, 64, 64), (4, 4, 64, 64), (8, 4, 64, 64), (4, 4, 128, 128)),
    "pixels": ((2, 3, 512, 512),),
    "video": ((1, 16, 13, 60, 90),),
    "overhead": ((1, 4, 4, 4),),  # 64 elements: what a call costs before it computes
}
# With classifier-free guidance of the teacher, as Stable Diffusion is distilled, and without.
GUIDED = "guided"

# Per element. Forward: two conversions 6, distance 3, gradient 2, square and magnitude 4; guidance 3. Backward: 1.
_FLOPS = {"forward": 15, "backward": 1}


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """Forward reads x, x_t and the predictions and writes the gradient in float32; backward reads that and writes
    grad_x."""
    size, guided = math.prod(case.shape), case.variant == GUIDED
    kept = 4 * size
    bytes_of = {"forward": (4 + guided) * size * dtype.itemsize + kept, "backward": kept + size * dtype.itemsize}
    passes = ("forward", "backward") if mode == "full" else (mode,)
    flops = sum(_FLOPS[name] * size for name in passes) + (3 * size if guided and "forward" in passes else 0)
    return Cost(sum(bytes_of[name] for name in passes), flops)


def setup(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> Inputs:
    """Samples on Stable Diffusion's schedule. The loss's gradient is as large as the number of elements, so that x's is
    of size 1, as a loss scaler makes it."""
    generator = torch.Generator(device).manual_seed(int(torch.randint(2**31, ())))

    def values() -> torch.Tensor:
        return torch.randn(case.shape, device=device, generator=generator)

    samples = case.shape[0]
    timesteps = torch.linspace(20, 979, samples + 2).long()[1:-1]
    alpha, sigma = (v.to(device) for v in diffusion.scaled_linear().at(timesteps))
    x, noise = values(), values()
    constants = {
        "x_t": diffusion.add_noise(x, noise, alpha, sigma).to(dtype),
        "pred_real": (noise + 0.1 * values()).to(dtype),
        "pred_fake": (noise + 0.1 * values()).to(dtype),
        "alpha": alpha,
        "sigma": sigma,
    }
    if case.variant == GUIDED:
        constants |= {"pred_real_uncond": (noise + 0.1 * values()).to(dtype), "guidance_scale": 3.0}
    return Inputs({"x": x.to(dtype)}, {"loss": torch.full((), float(x.numel()), device=device)}, constants)


def eager(
    x: torch.Tensor,
    x_t: torch.Tensor,
    pred_real: torch.Tensor,
    pred_fake: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    pred_real_uncond: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    """What public training loops write: guidance, two conversions to data, the normalised difference, the surrogate."""
    with torch.no_grad():
        per_sample = (-1, *(1,) * (x.dim() - 1))
        alpha, sigma = alpha.view(per_sample), sigma.view(per_sample)
        if pred_real_uncond is not None:
            pred_real = pred_real_uncond + guidance_scale * (pred_real - pred_real_uncond)
        mu_real = (x_t - sigma * pred_real) / alpha
        mu_fake = (x_t - sigma * pred_fake) / alpha
        p_real, p_fake = x - mu_real, x - mu_fake
        normaliser = p_real.abs().mean(dim=tuple(range(1, x.dim())), keepdim=True)
        gradient = torch.nan_to_num((p_real - p_fake) / normaliser)
    wide = x if x.dtype == torch.float64 else x.float()
    return 0.5 * F.mse_loss(wide, (wide - gradient).detach())


_TORCH = providers.eager("torch", eager)

BENCHMARK = Benchmark(
    op=OP,
    cases=cases(SITES, ("", GUIDED)),
    layouts=("contiguous",),
    setup=setup,
    cost=cost,
    baseline=_TORCH,
    providers=(
        *providers.backends(OP, dmd_loss),
        _TORCH,  # against itself: how far two identical functions scatter here
        providers.compiled("torch.compile", eager),
    ),
    default=providers.kernel_names(OP),
)
