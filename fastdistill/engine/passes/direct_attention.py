"""Attention without detours: joint projections, one call to scaled_dot_product_attention, no copies between layouts.

Queries, keys and values of self-attention are one matrix product instead of three, keys and values of cross-attention
one instead of two: the same rows of the same weights, stacked. A 1x1 convolution is a linear layer on tokens.
"""

from __future__ import annotations

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from fastdistill.engine.attention import DirectAttention, DirectImageAttention, DirectTransformer
from fastdistill.engine.components import Components
from fastdistill.engine.passes._replace import Tally, named_parts
from fastdistill.engine.report import PassReport
from fastdistill.nn.known_blocks import why_not_direct


def apply(components: Components) -> PassReport:
    tally = Tally("direct_attention")
    for where, network in components.networks.items():
        _rewrite_blocks(network, where, tally)
        _rewrite_transformers(network, where, tally)
        _rewrite_image_attention(network, where, tally)
        for _, _, attention in named_parts(network, Attention):
            tally.leave(
                f"attention in the {where}", why_not_direct(attention) or "its place in the network is not known"
            )
    return tally.report()


def _rewrite_blocks(network: torch.nn.Module, where: str, tally: Tally) -> None:
    for block in network.modules():
        if not isinstance(block, BasicTransformerBlock):
            continue
        if block.attn1 is not None and not block.only_cross_attention and not why_not_direct(block.attn1):
            block.attn1 = DirectAttention(block.attn1, cross=False)
            tally.change(f"self-attention with one product for q, k, v in the {where}")
        if block.attn2 is not None and not why_not_direct(block.attn2):
            block.attn2 = DirectAttention(block.attn2, cross=True)
            tally.change(f"cross-attention with one product for k, v in the {where}")


def _rewrite_transformers(network: torch.nn.Module, where: str, tally: Tally) -> None:
    for parent, name, transformer in named_parts(network, Transformer2DModel):
        if transformer.is_input_continuous:
            setattr(parent, name, DirectTransformer(transformer))
            tally.change(f"transformer on tokens without layout copies in the {where}")
        else:
            tally.leave(f"Transformer2DModel in the {where}", "its input is not an image")


def _rewrite_image_attention(network: torch.nn.Module, where: str, tally: Tally) -> None:
    for parent, name, attention in named_parts(network, Attention):
        if attention.group_norm is not None and attention.residual_connection and not why_not_direct(attention):
            setattr(parent, name, DirectImageAttention(attention))
            tally.change(f"self-attention over pixels with one product for q, k, v in the {where}")
