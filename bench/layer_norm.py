"""layer_norm against `F.layer_norm(...)`, with and without the residual sum in front, on the blocks of the UNets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from fastdistill.ops import layer_norm

from . import peers, providers
from .benchmark import Benchmark, Case, Inputs, cases
from .roofline import Cost, pointwise

OP = "layer_norm"

# (tokens, channels) of the transformer blocks: Stable Diffusion 1.5 and 2.1 at 512 px, SDXL at 1024 px.
SITES = {
    "sd15": ((4096, 320), (1024, 640), (256, 1280), (64, 1280)),
    "sdxl": ((4096, 640), (1024, 1280)),
}
# A block's first norm sees a sum that was stored before; the other two can make theirs themselves.
RESIDUAL = "residual"

# Per element. Forward: statistics 4, normalising with weight and bias 4. Backward: the normalised value again 2, four
# sums 6, grad_x 5. The residual costs one addition each way.
_FLOPS = {"forward": 8, "backward": 13}


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """Forward reads x and writes y, and with a residual reads that and writes the sum. Backward reads grad_y and x and
    writes grad_x, and with a residual also reads the sum's gradient; grad_residual is grad_x."""
    size, channels, extra = math.prod(case.shape), case.shape[-1], case.variant == RESIDUAL
    values = {
        "forward": (2 + 2 * extra) * size + 2 * channels,
        "backward": (3 + extra) * size + 3 * channels,
    }
    return pointwise(mode, dtype, values, {name: (flops + extra) * size for name, flops in _FLOPS.items()})


def setup(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> Inputs:
    """Batch 1. Channels differ in mean and scale, as those of a residual stream do."""
    channels = case.shape[-1]

    def activation() -> torch.Tensor:
        scale, mean = 0.5 + torch.rand(channels, device=device), torch.randn(channels, device=device)
        return (torch.randn((1, *case.shape), device=device) * scale + mean).to(dtype)

    def parameter(center: float) -> torch.Tensor:
        return (center + 0.3 * torch.randn(channels, device=device)).to(dtype)

    tensors = {"x": activation(), "weight": parameter(1.0), "bias": parameter(0.0)}
    gradients = {"y": activation()}
    if case.variant == RESIDUAL:
        tensors["residual"], gradients["sum"] = activation(), activation()
    return Inputs(tensors, gradients, {"eps": 1e-5})


def eager(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What a diffusers model calls."""
    if residual is None:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    total = x + residual
    return F.layer_norm(total, (x.shape[-1],), weight, bias, eps), total


def _liger(module: ModuleType) -> Callable[..., object]:
    norm = module.LigerLayerNormFunction

    def call(x, weight, bias, eps, residual=None):
        if residual is None:
            return norm.apply(x, weight, bias, eps)
        total = x + residual
        return norm.apply(total, weight, bias, eps), total

    return call


def _flash_attn(module: ModuleType) -> Callable[..., object]:
    def call(x, weight, bias, eps, residual=None):
        return module.layer_norm_fn(x, weight, bias, residual=residual, eps=eps, prenorm=residual is not None)

    return call


def _quack(module: ModuleType) -> Callable[..., torch.Tensor]:
    def call(x, weight, bias, eps):
        return module.layernorm_fwd(x.flatten(0, -2), weight, bias, eps).view_as(x)

    return call


def _with_float32_parameters(inputs: Inputs) -> Inputs:
    parameters = {name: inputs.tensors[name].float() for name in ("weight", "bias")}
    return Inputs({**inputs.tensors, **parameters}, inputs.grad_outputs, inputs.constants)


_TORCH = providers.eager("torch", eager)

BENCHMARK = Benchmark(
    op=OP,
    cases=cases(SITES, ("", RESIDUAL)),
    layouts=("contiguous",),
    setup=setup,
    cost=cost,
    baseline=_TORCH,
    providers=(
        *providers.backends(OP, layer_norm),
        _TORCH,  # against itself: how far two identical functions scatter here
        providers.compiled("torch.compile", eager),
        peers.peer("liger", "liger_kernel.ops.layer_norm", _liger),
        peers.peer("flash_attn", "flash_attn.ops.triton.layer_norm", _flash_attn),
        dataclasses.replace(
            peers.peer("quack", "quack.rmsnorm", _quack, note="forward only, float32 weight and bias"),
            adapt=_with_float32_parameters,
        ),
    ),
    default=providers.kernel_names(OP),
    suite_aliases={"unet": ("sd15", "sdxl")},
)
