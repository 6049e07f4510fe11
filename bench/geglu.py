"""geglu against `hidden, gate = x.chunk(2, -1); hidden * F.gelu(gate)`, on the feed-forward layers of the UNets."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from fastdistill.ops import geglu

from . import peers, providers
from .benchmark import Benchmark, Case, Inputs, cases
from .roofline import Cost, pointwise

OP = "geglu"

# (tokens, 8 C): a feed-forward layer widens C channels to 4 C values and as many gates. Stable Diffusion 1.5 and 2.1 at
# 512 px, SDXL at 1024 px.
SITES = {
    "sd15": ((4096, 2560), (1024, 5120), (256, 10240), (64, 10240)),
    "sdxl": ((4096, 5120), (1024, 10240)),
}

# Per gate. Forward: erf as 12, four around it, one product. Backward: the same again, the density 4, four products.
_FLOPS = {"forward": 17, "backward": 25}


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """Forward reads x (2 D) and writes y (D); backward reads x and grad_y and writes grad_x."""
    outputs = math.prod(case.shape) // 2
    values = {"forward": 3 * outputs, "backward": 5 * outputs}
    return pointwise(mode, dtype, values, {name: flops * outputs for name, flops in _FLOPS.items()})


def setup(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> Inputs:
    """Batch 1; values and gates of a linear layer's size."""
    tokens, width = case.shape
    x = 1.5 * torch.randn(1, tokens, width, device=device) + 0.3 * torch.randn(width, device=device)
    return Inputs({"x": x.to(dtype)}, {"y": torch.randn(1, tokens, width // 2, device=device).to(dtype)})


def eager(x: torch.Tensor) -> torch.Tensor:
    """What a diffusers model calls."""
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def _liger(module: ModuleType) -> Callable[[torch.Tensor], torch.Tensor]:
    product = module.LigerGELUMulFunction

    def call(x: torch.Tensor) -> torch.Tensor:
        hidden, gate = x.chunk(2, dim=-1)
        return product.apply(gate, hidden)

    return call


_TORCH = providers.eager("torch", eager)

BENCHMARK = Benchmark(
    op=OP,
    cases=cases(SITES),
    layouts=("contiguous",),
    setup=setup,
    cost=cost,
    baseline=_TORCH,
    providers=(
        *providers.backends(OP, geglu),
        _TORCH,  # against itself: how far two identical functions scatter here
        providers.compiled("torch.compile", eager),
        peers.peer(
            "liger",
            "liger_kernel.ops.geglu",
            _liger,
            note="the tanh approximation, not the exact erf; of two tensors, so both halves of x are copied first",
        ),
    ),
    default=providers.kernel_names(OP),
    suite_aliases={"unet": ("sd15", "sdxl")},
)
