"""Where in a diffusers model the fused ops fit: which modules `fastdistill.nn.patch` changes, and into what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from fastdistill.nn import patched, recomputed
from fastdistill.nn.known_blocks import is_plain, why_not_direct, why_not_residual


@dataclass(frozen=True)
class Site:
    """Modules that change together, and the class that each becomes; or the `reason` why they stay.

    deferred_norms: to each convolution the norm in front of it that it is to apply.
    attention: a module whose processor changes.
    """

    what: str
    classes: dict[torch.nn.Module, type] = field(default_factory=dict)
    reason: str | None = None
    deferred_norms: dict[torch.nn.Module, torch.nn.Module] = field(default_factory=dict)
    attention: torch.nn.Module | None = None


def find(model: torch.nn.Module, ops: tuple[str, ...], recompute: bool) -> Iterator[Site]:
    """Every site of `ops` in `model`; a module belongs to one site at most, the largest one."""
    taken: set[torch.nn.Module] = set()
    for op in ops:
        for site in _SEARCHES[op](model, recompute):
            if taken.isdisjoint(site.classes):
                taken.update(site.classes)
                yield site


def _group_norm_silu(model: torch.nn.Module, recompute: bool) -> Iterator[Site]:
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            yield _residual_block(module, recompute)
        norm, activation = getattr(module, "conv_norm_out", None), getattr(module, "conv_act", None)
        if type(norm) is torch.nn.GroupNorm and type(activation) is torch.nn.SiLU:
            yield _output_norm(norm, activation, module.conv_out, recompute)
        of_image = isinstance(module, Transformer2DModel) and module.is_input_continuous
        if recompute and of_image and _can_defer(module.norm, module.proj_in):
            yield Site(
                "GroupNorm + convolution, recomputed",
                {module.norm: recomputed.DeferredGroupNorm, module.proj_in: recomputed.NormedConv2d},
                deferred_norms={module.proj_in: module.norm},
            )
    for norm in model.modules():
        if type(norm) is torch.nn.GroupNorm:
            yield Site("GroupNorm", {norm: patched.PatchedGroupNorm})


def _residual_block(block: ResnetBlock2D, recompute: bool) -> Site:
    what = "residual block: 2 GroupNorm + SiLU"
    if reason := _replaced(block) or why_not_residual(block):
        return Site(what, reason=reason)
    norms = dict.fromkeys((block.norm1, block.norm2), patched.PatchedGroupNormSiLU)
    if recompute:
        return Site(f"{what} + convolution, recomputed", {block: recomputed.RecomputedResnetBlock2D, **norms})
    return Site(what, {block: patched.PatchedResnetBlock2D, **norms})


def _output_norm(norm, activation, conv, recompute: bool) -> Site:
    what = "GroupNorm + SiLU before the last convolution"
    if recompute and _can_defer(norm, conv):
        classes = {
            norm: recomputed.DeferredGroupNormSiLU,
            activation: patched.PatchedSiLU,
            conv: recomputed.NormedConv2d,
        }
        return Site(f"{what}, recomputed", classes, deferred_norms={conv: norm})
    return Site(what, {norm: patched.PatchedGroupNormSiLU, activation: patched.PatchedSiLU})


def _can_defer(norm: torch.nn.Module, conv: torch.nn.Module) -> bool:
    return is_plain(norm, torch.nn.GroupNorm) and recomputed.is_plain_convolution(conv)


def _layer_norm(model: torch.nn.Module, recompute: bool) -> Iterator[Site]:
    for block in model.modules():
        if type(block) is BasicTransformerBlock:
            yield _transformer_block(block, recompute)
    for norm in model.modules():
        if type(norm) is torch.nn.LayerNorm:
            if len(norm.normalized_shape) == 1:
                yield Site("LayerNorm", {norm: patched.PatchedLayerNorm})
            else:
                yield Site("LayerNorm", reason=f"it normalises over {tuple(norm.normalized_shape)}")


def _transformer_block(block: BasicTransformerBlock, recompute: bool) -> Site:
    norms = [norm for norm in (block.norm1, block.norm2, block.norm3) if norm is not None]
    what = f"transformer block: {len(norms)} LayerNorm"
    if reason := _replaced(block) or _why_not_with_residual(block, norms):
        return Site(what, reason=reason)
    classes = dict.fromkeys(norms, patched.PatchedLayerNorm)
    if recompute:
        return Site(f"{what} + projections, recomputed", {block: recomputed.RecomputedTransformerBlock, **classes})
    return Site(what, {block: patched.PatchedTransformerBlock, **classes})


def _why_not_with_residual(block: BasicTransformerBlock, norms: list[torch.nn.Module]) -> str | None:
    if block.norm_type != "layer_norm":
        return f"norm_type={block.norm_type!r}"
    if block.pos_embed is not None:
        return "it adds positional embeddings behind its norms"
    if hasattr(block, "fuser"):
        return "it has a gated attention between its attentions"
    if not all(type(norm) is torch.nn.LayerNorm for norm in norms):
        return "its norms are not LayerNorm"
    return None


def _geglu(model: torch.nn.Module, recompute: bool) -> Iterator[Site]:
    if recompute:
        for module in model.modules():
            if type(module) is FeedForward and type(module.net[0]) is GEGLU:
                classes = {module: recomputed.RecomputedFeedForward, module.net[0]: patched.PatchedGEGLU}
                reason = _replaced(module)
                yield Site("GEGLU + linear layer, recomputed", {} if reason else classes, reason)
    for module in model.modules():
        if type(module) is GEGLU:
            reason = _replaced(module)
            yield Site("GEGLU", {} if reason else {module: patched.PatchedGEGLU}, reason)


def _attention(model: torch.nn.Module, recompute: bool) -> Iterator[Site]:
    for module in model.modules():
        if isinstance(module, Attention):
            if reason := _replaced(module) or why_not_direct(module):
                yield Site("attention", reason=reason)
            else:
                classes = {module: patched.PatchedAttention} if type(module) is Attention else {}
                yield Site("attention", classes, attention=module)


def _replaced(module: torch.nn.Module) -> str | None:
    return "its forward was replaced by somebody else" if "forward" in module.__dict__ else None


_SEARCHES = {
    "group_norm_silu": _group_norm_silu,
    "layer_norm": _layer_norm,
    "geglu": _geglu,
    "attention": _attention,
}
