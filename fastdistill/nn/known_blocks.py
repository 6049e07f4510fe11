"""Which of diffusers' blocks are built the way that this package's rewrites know, and how others differ."""

from __future__ import annotations

import torch


def is_plain(module: torch.nn.Module, kind: type) -> bool:
    """Whether the module is of this very class and may be computed without being called."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return type(module) is kind and "forward" not in module.__dict__ and not any(hooks)


def why_not_residual(block) -> str | None:
    """Why a `ResnetBlock2D` is not norm, SiLU, convolution, time, norm, SiLU, convolution; None when it is."""
    if not isinstance(block.nonlinearity, torch.nn.SiLU):
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
    # The VAE's blocks say "group" and have no time embedding at all.
    if block.time_embedding_norm != "default" and block.time_emb_proj is not None:
        return f"time_embedding_norm={block.time_embedding_norm!r} does not add the embedding before norm2"
    if block.upsample is not None or block.downsample is not None:
        return "it resamples between norm1 and conv1"
    if not all(isinstance(norm, torch.nn.GroupNorm) for norm in (block.norm1, block.norm2)):
        return "its norms are not GroupNorm"
    return None


def why_not_direct(attention) -> str | None:
    """Why an `Attention` is not plain projections around scaled_dot_product_attention; None when it is."""
    processor = type(attention.processor).__name__
    if processor not in ("AttnProcessor2_0", "FusedAttnProcessor"):
        return f"its processor is {processor}"
    for extra in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj"):
        if getattr(attention, extra, None) is not None:
            return f"it has {extra}"
    projections = (attention.to_q, attention.to_k, attention.to_v)
    if any(type(projection) is not torch.nn.Linear for projection in projections):
        return "its projections are not plain linear layers"
    if len({projection.out_features for projection in projections}) != 1:
        return "its keys have another width than its queries"
    return None
