"""Random weights that every part of a network can be seen through: no branch dies out, none overflows float16."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

CHUNK = 2**18  # values that are drawn at a time: they stay in the cache until they are rounded
SPREAD = 0.1  # standard deviation of biases and of a norm's affine about their neutral values


@torch.no_grad()
def fill(network: nn.Module, name: str, seed: int) -> None:
    """Give every parameter of `network` normal values that depend on `name`, `seed` and the kind of device.

    Weights have the standard deviation 1/sqrt(fan in), embeddings 1; biases and norms are near 0 and 1 but not at
    them, so that whoever drops one computes something else. Drawn in float32, then rounded to the network's dtype.
    """
    device = next(network.parameters()).device
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
    drawn = torch.empty(CHUNK, device=device)
    for module in network.modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            is_scale = isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and parameter_name == "weight"
            mean, deviation = float(is_scale), _deviation(module, parameter)
            for part in parameter.view(-1).split(CHUNK):
                part.copy_(drawn[: len(part)].normal_(mean, deviation, generator=generator))


def _deviation(module: nn.Module, parameter: Tensor) -> float:
    if isinstance(module, nn.Embedding):
        return 1.0
    if parameter.dim() == 1:
        return SPREAD
    return parameter[0].numel() ** -0.5
