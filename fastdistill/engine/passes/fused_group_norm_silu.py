"""Every GroupNorm, with the SiLU that follows it and the time embedding added before it, as one fused op.

silu(group_norm(x + time)) is what `fastdistill.ops.group_norm_silu` computes; nothing else changes. Served are residual
blocks, the output norm of each network and the norms in front of attention (without SiLU).
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from fastdistill.engine.components import Components
from fastdistill.engine.norm import BoundGroupNormSiLU
from fastdistill.engine.passes._replace import Tally, named_parts
from fastdistill.engine.report import PassReport
from fastdistill.engine.resnet import ResidualBlock
from fastdistill.nn.known_blocks import why_not_residual


def apply(components: Components) -> PassReport:
    tally = Tally("fused_group_norm_silu")
    for where, network in components.networks.items():
        _fuse_residual_blocks(network, where, tally)
        _fuse_output_norm(network, where, tally)
        _fuse_attention_norms(network, where, tally)
        for _, name, norm in named_parts(network, torch.nn.GroupNorm):
            if not isinstance(norm, BoundGroupNormSiLU):
                tally.leave(f"GroupNorm {name!r} in the {where}", "not known to be followed by SiLU or attention")
    return tally.report()


def _fuse_residual_blocks(network: torch.nn.Module, where: str, tally: Tally) -> None:
    for parent, name, block in named_parts(network, ResnetBlock2D):
        if reason := why_not_residual(block):
            tally.leave(f"ResnetBlock2D in the {where}", reason)
            continue
        fused = ResidualBlock(block)
        fused.norm1, fused.norm2 = _fused(block.norm1), _fused(block.norm2)
        setattr(parent, name, fused)
        timed = block.time_emb_proj is not None
        tally.change(f"GroupNorm + SiLU of residual blocks in the {where}", 1 if timed else 2)
        if timed:
            tally.change(f"time embedding + GroupNorm + SiLU of residual blocks in the {where}")


def _fuse_output_norm(network: torch.nn.Module, where: str, tally: Tally) -> None:
    norm, activation = network.conv_norm_out, network.conv_act
    if type(norm) is torch.nn.GroupNorm and isinstance(activation, torch.nn.SiLU):
        network.conv_norm_out, network.conv_act = _fused(norm), torch.nn.Identity()
        tally.change(f"GroupNorm + SiLU before the last convolution of the {where}")
    elif norm is not None:
        kinds = f"{type(norm).__name__} + {type(activation).__name__}"
        tally.leave(f"output norm of the {where}", f"it is {kinds}, not GroupNorm + SiLU")


def _fuse_attention_norms(network: torch.nn.Module, where: str, tally: Tally) -> None:
    for module in network.modules():
        name = {Transformer2DModel: "norm", Attention: "group_norm"}.get(type(module))
        if name and type(getattr(module, name, None)) is torch.nn.GroupNorm:
            setattr(module, name, _fused(getattr(module, name), silu=False))
            tally.change(f"GroupNorm before attention in the {where}")


def _fused(norm: torch.nn.GroupNorm, *, silu: bool = True) -> BoundGroupNormSiLU:
    return BoundGroupNormSiLU.from_group_norm(norm, silu=silu)
