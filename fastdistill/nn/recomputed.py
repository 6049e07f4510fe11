"""The classes of `fastdistill.nn.patched` that keep less for the backward pass (`patch(model, recompute=True)`).

Where a norm or GEGLU feeds plain layers, they run as one step of `fastdistill.nn.recompute`. A layer that somebody has
hooks on or has replaced (by a LoRA layer, say) is called as the module it is.
"""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F

from fastdistill.nn.attention import FusedAttnProcessor
from fastdistill.nn.joint import linears
from fastdistill.nn.known_blocks import is_plain, why_not_direct
from fastdistill.nn.patched import (
    PatchedAttention,
    PatchedGEGLU,
    PatchedGroupNorm,
    PatchedGroupNormSiLU,
    PatchedLayerNorm,
    PatchedResnetBlock2D,
    PatchedTransformerBlock,
)
from fastdistill.nn.recompute import geglu_linear, group_norm_silu_conv2d, layer_norm_linears
from fastdistill.ops import attention as fused_attention


def is_plain_convolution(module: torch.nn.Module) -> bool:
    return is_plain(module, torch.nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def norm_conv(norm: PatchedGroupNorm, conv: torch.nn.Conv2d, x: Tensor, add: Tensor | None = None) -> Tensor:
    """`conv(norm(x, add))` of plain modules, without keeping what is between them."""
    return group_norm_silu_conv2d(
        x,
        norm.num_groups,
        norm.weight,
        norm.bias,
        norm.eps,
        conv.weight,
        conv.bias,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        silu=norm.silu,
        add=add,
    )


class RecomputedResnetBlock2D(PatchedResnetBlock2D):
    def _norm1_conv1(self, x: Tensor) -> Tensor:
        if is_plain(self.norm1, PatchedGroupNormSiLU) and is_plain_convolution(self.conv1):
            return norm_conv(self.norm1, self.conv1, x)
        return super()._norm1_conv1(x)

    def _norm2_conv2(self, x: Tensor, time: Tensor | None) -> Tensor:
        dropout = self.training and self.dropout.p > 0
        if not dropout and is_plain(self.norm2, PatchedGroupNormSiLU) and is_plain_convolution(self.conv2):
            return norm_conv(self.norm2, self.conv2, x, time)
        return super()._norm2_conv2(x, time)


class DeferredGroupNorm(PatchedGroupNorm):
    """Leaves its input as it is: the convolution behind it (`NormedConv2d`) applies it."""

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return x


class DeferredGroupNormSiLU(DeferredGroupNorm):
    silu = True


class NormedConv2d(torch.nn.Conv2d):
    """A convolution that applies the norm in front of it, `deferred_norm`, itself."""

    replaces = torch.nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        return norm_conv(self.deferred_norm, self, x)


class RecomputedFeedForward(FeedForward):
    """GEGLU and the linear layer behind it, which does not keep their product."""

    replaces = FeedForward

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return (
            self.after_projection(self.net[0].proj(hidden_states))
            if self.is_plain()
            else super().forward(hidden_states)
        )

    def is_plain(self) -> bool:
        """Whether its layers may be computed without being called."""
        activation, dropout, linear = self.net[:3]
        return (
            is_plain(activation, PatchedGEGLU)
            and not (self.training and dropout.p > 0)
            and is_plain(activation.proj, torch.nn.Linear)
            and is_plain(linear, torch.nn.Linear)
        )

    def after_projection(self, projected: Tensor) -> Tensor:
        linear = self.net[2]
        out = geglu_linear(projected, linear.weight, linear.bias)
        for module in self.net[3:]:
            out = module(out)
        return out


class RecomputedTransformerBlock(PatchedTransformerBlock):
    """Does not keep the results of its LayerNorms, which the projections behind them would."""

    def _attend_to_itself(self, h: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        attention = self.attn1
        if context is not None or mask is not None or not _is_plain_attention(attention, self.norm1):
            return super()._attend_to_itself(h, context, mask)
        q, k, v = _norm_linears(self.norm1, h, (attention.to_q, attention.to_k, attention.to_v))
        return _attend(attention, q, k, v)

    def _attend_to_context(
        self, out: Tensor, h: Tensor, context: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        attention = self.attn2
        if not isinstance(context, Tensor) or mask is not None or not _is_plain_attention(attention, self.norm2):
            return super()._attend_to_context(out, h, context, mask)
        q, h = _norm_linears(self.norm2, out, (attention.to_q,), residual=h)
        return _attend(attention, q, *linears(context, (attention.to_k, attention.to_v))), h

    def _feed_forward(self, out: Tensor, h: Tensor) -> Tensor:
        plain = (
            is_plain(self.ff, RecomputedFeedForward) and self.ff.is_plain() and is_plain(self.norm3, PatchedLayerNorm)
        )
        if not (plain and is_plain(self.ff.net[0].proj, torch.nn.Linear)):
            return super()._feed_forward(out, h)
        projected, h = _norm_linears(self.norm3, out, (self.ff.net[0].proj,), residual=h)
        return self.ff.after_projection(projected) + h


def _is_plain_attention(attention: Attention, norm: torch.nn.Module) -> bool:
    return (
        (is_plain(attention, Attention) or is_plain(attention, PatchedAttention))
        and is_plain(norm, PatchedLayerNorm)
        and all(is_plain(layer, torch.nn.Linear) for layer in (attention.to_q, attention.to_k, attention.to_v))
        and why_not_direct(attention) is None
        and attention.group_norm is None
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )


def _norm_linears(norm: PatchedLayerNorm, x: Tensor, layers: tuple, residual: Tensor | None = None) -> tuple:
    """`layer(norm(x + residual))` of each plain layer, and the sum behind them if there is one."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return layer_norm_linears(x, norm.weight, norm.bias, norm.eps, weights, biases, residual=residual)


def _attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """From (B, N, heads * D) each to what `Attention` returns."""
    q, k, v = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (q, k, v))
    attend = fused_attention if isinstance(attention.processor, FusedAttnProcessor) else F.scaled_dot_product_attention
    out = attend(q, k, v).transpose(1, 2).flatten(2)
    return attention.to_out[1](attention.to_out[0](out))
