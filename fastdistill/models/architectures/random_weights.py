"""Random weights that every part of a network can be seen through: no branch dies out, none overflows float16."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

SPREAD = 0.1  # standard deviation of biases and of a norm's affine about their neutral values


@torch.no_grad()
def fill(network: nn.Module, name: str, seed: int) -> None:
    """Give every parameter of `network` normal values that depend on `name`, `seed` and the kind of device.

    Weights have the standard deviation 1/sqrt(fan in), embeddings 1; biases and norms are near 0 and 1 but not at
    them, for a pass that forgot one to be seen. Drawn in float32, then rounded to the network's dtype.
    """
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator(next(network.parameters()).device)
    generator.manual_seed(int.from_bytes(digest, "big") % 2**63)
    for module in network.modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
            values.normal_(generator=generator).mul_(_deviation(module, parameter))
            is_norm = isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and parameter_name == "weight"
            parameter.copy_(values.add_(1.0) if is_norm else values)


def _deviation(module: nn.Module, parameter: Tensor) -> float:
    if isinstance(module, nn.Embedding):
        return 1.0
    if parameter.dim() == 1:
        return SPREAD
    return parameter[0].numel() ** -0.5
