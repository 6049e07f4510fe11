"""Constant-timestep folding: the time embedding becomes a bias of each residual block's first convolution.

A sampler visits known timesteps, so time features, the time MLP and every block's projection p are constants. They are
evaluated once per timestep: adding p(t) to every pixel after a convolution is the same as adding it to its bias.
A plan of several steps keeps one set of biases per step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from fastdistill.engine.components import Components
from fastdistill.engine.passes._replace import Tally, named_parts
from fastdistill.engine.report import PassReport
from fastdistill.engine.resnet import ResidualBlock
from fastdistill.engine.unet import time_embedding
from fastdistill.nn.known_blocks import why_not_residual


def apply(components: Components) -> PassReport:
    name, unet = "fold_timestep", components.unet
    reasons = {reason for _, _, block in named_parts(unet, ResnetBlock2D) if (reason := why_not_residual(block))}
    if reasons:  # all or nothing: one block that needs the embedding itself needs the whole time MLP
        return PassReport(name, left=tuple(f"a ResnetBlock2D of the UNet: {reason}" for reason in sorted(reasons)))
    for parent, attribute, block in named_parts(unet, ResnetBlock2D):
        setattr(parent, attribute, ResidualBlock(block))
    blocks = [block for _, _, block in named_parts(unet, ResidualBlock) if block.time_emb_proj is not None]
    for index, block in enumerate(blocks):
        block.bias_index = index
    components.folded_blocks = tuple(blocks)
    tally = Tally(name)
    tally.change("time projection folded into a convolution's bias, once per timestep", len(blocks))
    tally.change("time features and time MLP, evaluated once per timestep")
    return tally.report()


@torch.no_grad()
def fold(unet: torch.nn.Module, blocks: Sequence[ResidualBlock], timestep: Tensor) -> tuple[Tensor, ...]:
    """(C,) per block: the bias of its first convolution at this timestep (), in the model's dtype."""
    embedding = time_embedding(unet, timestep, 1, unet.dtype)
    biases = []
    for block in blocks:
        projected = block.project_time(embedding)[0]
        biases.append(projected if block.conv1.bias is None else block.conv1.bias + projected)
    return tuple(biases)
