"""Where in a diffusers model the fused ops fit: which modules `fastdistill.nn.patch` changes, and into what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from fastdistill.nn import patched


@dataclass(frozen=True)
class Site:
    """Modules that change together, and the class that each becomes; or the `reason` why they stay."""

    what: str
    classes: dict[torch.nn.Module, type] = field(default_factory=dict)
    reason: str = ""


def find(model: torch.nn.Module, ops: tuple[str, ...], recompute: bool) -> Iterator[Site]:
    """Every site of `ops` in `model`; a module belongs to one site at most."""
    taken: set[torch.nn.Module] = set()
    for search in (*(_SEARCHES[op] for op in ops),):
        for site in search(model):
            if taken.isdisjoint(site.classes):
                taken.update(site.classes)
                yield site


def _group_norm_silu(model: torch.nn.Module) -> Iterator[Site]:
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            what = "residual block: 2 GroupNorm + SiLU"
            reason = _replaced(module) or why_not_fused(module)
            norms = dict.fromkeys((module.norm1, module.norm2), patched.PatchedGroupNormSiLU)
            yield Site(what, {module: patched.PatchedResnetBlock2D, **norms}) if not reason else Site(what, {}, reason)
        norm, activation = getattr(module, "conv_norm_out", None), getattr(module, "conv_act", None)
        if type(norm) is torch.nn.GroupNorm and type(activation) is torch.nn.SiLU:
            yield Site(
                "GroupNorm + SiLU before the last convolution",
                {norm: patched.PatchedGroupNormSiLU, activation: patched.PatchedSiLU},
            )
    for norm in model.modules():
        if type(norm) is torch.nn.GroupNorm:
            yield Site("GroupNorm", {norm: patched.PatchedGroupNorm})


def why_not_fused(block: ResnetBlock2D) -> str:
    """Why a residual block's norms cannot take its SiLUs and its time embedding; empty when they can."""
    if not isinstance(block.nonlinearity, torch.nn.SiLU):
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
    # The VAE's blocks say "group" and have no time embedding at all.
    if block.time_embedding_norm != "default" and block.time_emb_proj is not None:
        return f"time_embedding_norm={block.time_embedding_norm!r} does not add the embedding before norm2"
    if block.upsample is not None or block.downsample is not None:
        return "it resamples between norm1 and conv1"
    if not all(type(norm) is torch.nn.GroupNorm for norm in (block.norm1, block.norm2)):
        return "its norms are not GroupNorm"
    return ""


def _layer_norm(model: torch.nn.Module) -> Iterator[Site]:
    for block in model.modules():
        if type(block) is not BasicTransformerBlock:
            continue
        norms = [norm for norm in (block.norm1, block.norm2, block.norm3) if norm is not None]
        reason = _replaced(block) or _why_not_with_residual(block, norms)
        what = f"transformer block: {len(norms)} LayerNorm"
        if reason:
            yield Site(what, {}, reason)
        else:
            classes = dict.fromkeys(norms, patched.PatchedLayerNorm)
            yield Site(what, {block: patched.PatchedTransformerBlock, **classes})
    for norm in model.modules():
        if type(norm) is torch.nn.LayerNorm:
            reason = "" if len(norm.normalized_shape) == 1 else f"it normalises over {norm.normalized_shape}"
            yield Site("LayerNorm", {} if reason else {norm: patched.PatchedLayerNorm}, reason)


def _why_not_with_residual(block: BasicTransformerBlock, norms: list[torch.nn.Module]) -> str:
    if block.norm_type != "layer_norm":
        return f"norm_type={block.norm_type!r}"
    if block.pos_embed is not None:
        return "it adds positional embeddings behind its norms"
    if hasattr(block, "fuser"):
        return "it has a gated attention between its attentions"
    if not all(type(norm) is torch.nn.LayerNorm for norm in norms):
        return "its norms are not LayerNorm"
    return ""


def _geglu(model: torch.nn.Module) -> Iterator[Site]:
    for module in model.modules():
        if type(module) is GEGLU:
            reason = _replaced(module)
            yield Site("GEGLU", {} if reason else {module: patched.PatchedGEGLU}, reason)


def _replaced(module: torch.nn.Module) -> str:
    return "its forward was replaced by somebody else" if "forward" in module.__dict__ else ""


_SEARCHES = {"group_norm_silu": _group_norm_silu, "layer_norm": _layer_norm, "geglu": _geglu}
