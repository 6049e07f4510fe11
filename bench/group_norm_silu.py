"""group_norm_silu against `F.silu(F.group_norm(...))`, on the shapes of the public UNets and their VAE decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from fastdistill.ops import group_norm_silu

from . import peers, providers
from .benchmark import Benchmark, Case, Inputs, cases
from .roofline import Cost, pointwise

OP = "group_norm_silu"

_SUITES = {
    # The 45 GroupNorm+SiLU of the Stable Diffusion 1.5 (and 2.1) UNet at 512 px.
    "sd15": (
        *((320, 64, 64), (640, 64, 64), (960, 64, 64)),
        *((320, 32, 32), (640, 32, 32), (960, 32, 32), (1280, 32, 32), (1920, 32, 32)),
        *((640, 16, 16), (1280, 16, 16), (1920, 16, 16), (2560, 16, 16)),
        *((1280, 8, 8), (2560, 8, 8)),
    ),
    # SDXL's UNet at 1024 px.
    "sdxl": (
        *((320, 128, 128), (640, 128, 128), (960, 128, 128)),
        *((320, 64, 64), (640, 64, 64), (960, 64, 64), (1280, 64, 64), (1920, 64, 64)),
        *((640, 32, 32), (1280, 32, 32), (1920, 32, 32), (2560, 32, 32)),
    ),
    # The AutoencoderKL decoder of either, at 512 px.
    "vae": (
        *((512, 64, 64), (512, 128, 128), (512, 256, 256)),
        *((256, 256, 256), (256, 512, 512), (128, 512, 512)),
    ),
}


# Per element. Forward: statistics 4, normalising with weight and bias 4, SiLU 4. Backward: the normalised value and its
# SiLU again 8, their derivatives 8, three sums 6, grad_x 5.
_FLOPS = {"forward": 12, "backward": 27}


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """Forward reads x and writes y; backward reads grad_y and x and writes grad_x."""
    size, channels = math.prod(case.shape), case.shape[0]
    values = {"forward": 2 * size + 2 * channels, "backward": 3 * size + 4 * channels}
    return pointwise(mode, dtype, values, {name: flops * size for name, flops in _FLOPS.items()})


def setup(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> Inputs:
    """Batch 1, 32 groups. Channels differ in mean and scale, as a convolution's do."""
    shape = (1, *case.shape)
    per_channel = (1, case.shape[0], *(1 for _ in case.shape[1:]))

    def activation() -> torch.Tensor:
        values = torch.randn(shape, device=device)
        values = values * (0.5 + torch.rand(per_channel, device=device)) + torch.randn(per_channel, device=device)
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        return values.to(dtype).contiguous(memory_format=memory_format)

    def parameter(center: float) -> torch.Tensor:
        return (center + 0.3 * torch.randn(case.shape[0], device=device)).to(dtype)

    return Inputs(
        {"x": activation(), "weight": parameter(1.0), "bias": parameter(0.0)},
        {"y": activation()},
        {"num_groups": 32, "eps": 1e-5},
    )


def eager(x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """What a diffusers model calls."""
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))


def _to_the_other_layout(inputs: Inputs) -> Inputs:
    x, grad_y = inputs.tensors["x"], inputs.grad_outputs["y"]
    contiguous = torch.contiguous_format
    target = contiguous if x.is_contiguous(memory_format=torch.channels_last) else torch.channels_last
    return Inputs(
        {**inputs.tensors, "x": x.contiguous(memory_format=target)},
        {"y": grad_y.contiguous(memory_format=target)},
        inputs.constants,
    )


def _liger(module: ModuleType) -> Callable[..., torch.Tensor]:
    norm = module.LigerGroupNormFunction

    def call(x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        return F.silu(norm.apply(x, weight, bias, x.shape[1], num_groups, eps))

    return call


_TORCH = providers.eager("torch", eager)

BENCHMARK = Benchmark(
    op=OP,
    cases=cases(_SUITES),
    layouts=("contiguous", "channels_last"),
    setup=setup,
    cost=cost,
    baseline=_TORCH,
    providers=(
        *providers.backends(OP, group_norm_silu),
        _TORCH,  # against itself: how far two identical functions scatter here
        providers.other_layout("torch.other_layout", eager, _to_the_other_layout),
        providers.compiled("torch.compile", eager),
        peers.peer("liger", "liger_kernel.ops.group_norm", _liger, note="its GroupNorm, then torch's SiLU"),
    ),
    default=providers.kernel_names(OP),
    suite_aliases={"unet": ("sd15", "sdxl")},
)
