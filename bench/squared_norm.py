"""squared_norm against squaring and summing tensor by tensor, on the gradients that R1 takes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fastdistill.ops import _dispatch, squared_norm

from . import providers
from .benchmark import Benchmark, Case, Inputs, Provider, cases
from .roofline import Cost, pointwise

OP = "squared_norm"
BATCH = 8

# (tensors, values per sample of each): the inputs of ADD's five heads on a ViT-S/16 at 224 px; images and latents.
SITES = {"add": ((5, 384, 197),), "pixels": ((1, 3, 256, 256),), "latents": ((1, 4, 64, 64),)}


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """Forward reads the tensors; backward reads them and writes as many gradients."""
    size = BATCH * math.prod(case.shape)
    return pointwise(mode, dtype, {"forward": size, "backward": 2 * size}, {"forward": 2 * size, "backward": size})


def setup(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> Inputs:
    """Gradients whose norms over a sample are near 1."""
    count, *shape = case.shape
    scale = math.prod(case.shape) ** -0.5
    tensors = {f"x{i}": (scale * torch.randn(BATCH, *shape, device=device)).to(dtype) for i in range(count)}
    return Inputs(tensors, {"norm": 1 + torch.rand(BATCH, device=device)})


def eager(**tensors: torch.Tensor) -> torch.Tensor:
    """What a training loop does, tensor by tensor."""
    return sum(t.square().flatten(1).sum(1) for t in tensors.values())


def _backend(record: _dispatch.Backend) -> Provider:
    def call(**tensors: torch.Tensor) -> torch.Tensor:
        return squared_norm(list(tensors.values()), backend=record.name)

    return Provider(record.name, _always(call), lambda inputs: record.supports(list(inputs.tensors.values())))


def _always(call: Callable[..., object]) -> Callable[[Inputs], Callable[..., object]]:
    return lambda _: call


_TORCH = providers.eager("torch", eager)

BENCHMARK = Benchmark(
    op=OP,
    cases=cases(SITES),
    layouts=("contiguous",),
    setup=setup,
    cost=cost,
    baseline=_TORCH,
    providers=(
        *map(_backend, _dispatch.ops()[OP].backends),
        _TORCH,  # against itself: how far two identical functions scatter here
        providers.compiled("torch.compile", eager),
    ),
    default=providers.kernel_names(OP),
)
