"""adversarial_loss against a discriminator's loss written head by head, at the heads of ADD and of a conv critic."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastdistill.ops import _dispatch, adversarial_loss

from . import providers
from .benchmark import Benchmark, Case, Inputs, Provider, cases
from .roofline import Cost, pointwise

OP = "adversarial_loss"
BATCH = 8

# (heads, logits per sample of a head). ADD's five heads on a ViT-S/16 at 224 px as its paper has them and before the
# projection on 64 channels at patches of 14; a patch critic's map of 30 x 30.
SITES = {"add": ((5, 1, 197), (5, 64, 257)), "patch": ((1, 1, 30, 30),)}
SOFTPLUS = "softplus"

# Per logit. Forward: the term and its sum 3, the statistics 5; softplus 25 more. Backward: slope and product 3, or 10.
_FLOPS = {"": {"forward": 8, "backward": 3}, SOFTPLUS: {"forward": 33, "backward": 10}}


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """Forward reads the real and the fake logits; backward reads them and writes as many gradients."""
    logits = 2 * BATCH * math.prod(case.shape)
    values = {"forward": logits, "backward": 2 * logits}
    return pointwise(mode, dtype, values, {name: flops * logits for name, flops in _FLOPS[case.variant].items()})


def setup(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> Inputs:
    """Logits on both sides of 0 and of the hinge's corner. The loss's gradient is a loss scale: the logits' gradients,
    one part in the number of logits, are not tiny."""
    heads, *shape = case.shape
    names = [f"{kind}{head}" for kind in ("real", "fake") for head in range(heads)]
    tensors = {name: (1.5 * torch.randn(BATCH, *shape, device=device)).to(dtype) for name in names}
    scale = torch.tensor(1024.0, device=device)
    return Inputs(tensors, {"loss": scale}, {"function": case.variant or "hinge"})


def eager(function: str, **logits: torch.Tensor) -> torch.Tensor:
    """What a training loop does, head by head."""
    real, fake = heads_of(logits)
    term = F.softplus if function == SOFTPLUS else lambda z: F.relu(1 + z)
    return sum(term(-r).mean() + term(f).mean() for r, f in zip(real, fake)) / len(real)


def heads_of(logits: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    tensors = list(logits.values())
    return tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]


def _backend(record: _dispatch.Backend) -> Provider:
    def call(function: str, **logits: torch.Tensor) -> torch.Tensor:
        return adversarial_loss(*heads_of(logits), function=function, backend=record.name)[0]

    def missing(inputs: Inputs) -> list[str]:
        return record.supports(*heads_of(inputs.tensors))

    return Provider(record.name, _always(call), missing)


def _always(call: Callable[..., object]) -> Callable[[Inputs], Callable[..., object]]:
    return lambda _: call


_TORCH = providers.eager("torch", eager)

BENCHMARK = Benchmark(
    op=OP,
    cases=cases(SITES, ("", SOFTPLUS)),
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
