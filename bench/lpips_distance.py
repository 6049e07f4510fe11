"""lpips_distance against what the public `lpips` package does with the features of VGG16, layer by layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastdistill.ops import lpips_distance

from . import providers
from .benchmark import Benchmark, Case, Inputs, cases
from .roofline import Cost, pointwise

OP = "lpips_distance"

# The five features of VGG16 that LPIPS takes: channels, and what their side is divided by.
LAYERS = ((64, 1), (128, 2), (256, 4), (512, 8), (512, 16))


def layers(resolution: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((channels, resolution // by, resolution // by) for channels, by in LAYERS)


SITES = {"vgg512": layers(512), "vgg64": layers(64)}

# Per feature. Forward: of each image a square, a sum and a product; the difference, its square, weight and sum.
# Backward: the same to the differences again, two weighted sums, three operations for each gradient.
_FLOPS = {"forward": 10, "backward": 19}


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """Forward reads both features, backward reads them again and writes both gradients. Weights are frozen."""
    size = math.prod(case.shape)
    values = {"forward": 2 * size, "backward": 4 * size}
    return pointwise(mode, dtype, values, {name: flops * size for name, flops in _FLOPS.items()})


def setup(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> Inputs:
    """Batch 1; what leaves a ReLU, with channels of different sizes."""

    def features() -> torch.Tensor:
        size = 0.5 + torch.rand(1, case.shape[0], 1, 1, device=device)
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        values = (size * torch.randn((1, *case.shape), device=device)).relu()
        return values.to(dtype).contiguous(memory_format=memory_format)

    weights = torch.rand(case.shape[0], device=device)
    gradient = torch.ones(1, device=device, dtype=dtype)
    return Inputs({"features_x": features(), "features_y": features()}, {"distance": gradient}, {"weights": weights})


Layers = torch.Tensor | list[torch.Tensor]


def eager(features_x: Layers, features_y: Layers, weights: Layers) -> torch.Tensor:
    """What the public package calls, of one layer or of a list."""
    if isinstance(features_x, list):
        return sum(map(eager, features_x, features_y, weights))
    difference = (_unit(features_x) - _unit(features_y)) ** 2
    return F.conv2d(difference, weights.to(difference.dtype).view(1, -1, 1, 1)).mean((1, 2, 3))


def _unit(features: torch.Tensor) -> torch.Tensor:
    return features / (torch.sqrt(torch.sum(features**2, dim=1, keepdim=True)) + 1e-10)


# ---- memory: the same call for both, gradients to x alone, as when an image is trained towards another ---------------

fused = lpips_distance


def inputs(resolution: int = 64, batch: int = 2) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """All five layers of VGG16 in float32 on the CPU: (features_x, features_y, weights)."""
    sizes = [(batch, *layer) for layer in layers(resolution)]
    features_x = [torch.randn(size).relu_().requires_grad_() for size in sizes]
    return features_x, [torch.randn(size).relu_() for size in sizes], [torch.rand(size[1]) for size in sizes]


_TORCH = providers.eager("torch", eager)

BENCHMARK = Benchmark(
    op=OP,
    cases=cases(SITES),
    layouts=("contiguous", "channels_last"),
    setup=setup,
    cost=cost,
    baseline=_TORCH,
    providers=(
        *providers.backends(OP, lpips_distance),
        _TORCH,  # against itself: how far two identical functions scatter here
        providers.compiled("torch.compile", eager),
    ),
    default=providers.kernel_names(OP),
    suite_aliases={"vgg": ("vgg512", "vgg64")},
)
