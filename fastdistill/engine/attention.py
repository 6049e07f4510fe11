"""diffusers' attention modules written straight: one product for all projections, no copies between layouts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistill.ops import Explanation, attention_sdpa, explain
from fastdistill.ops.attention import reference

_MOST_BINDINGS = 64


class BoundAttention:
    """`fastdistill.ops.attention` that checks its input and chooses its backend once per kind of input.

    As `fastdistill.engine.norm.BoundGroupNormSiLU`: the choice is that of `fastdistill.ops.explain` at the first call;
    a FASTDISTILL_BACKEND that changes later has no effect. Not differentiable. One per attention module, whose
    projections have the same strides whenever they have the same shape.

    Attributes:
        explanations: of every kind of input so far, by its sizes as in "8x4096x77x40, batch 1".
    """

    def __init__(self) -> None:
        self.explanations: dict[str, Explanation] = {}
        self._bindings: dict[tuple, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """o (B, H, N, D), in whatever memory order, from q (B, H, N, D) and k, v (B, H, M, D)."""
        kind = (q.shape, k.shape, q.dtype, q.device)
        kernel = self._bindings.get(kind)
        if kernel is None:
            kernel = self._bind(kind, q, k, v)
        return kernel(q, k, v)

    def _bind(self, kind: tuple, q: Tensor, k: Tensor, v: Tensor):
        explanation = explain("attention", q, k, v)
        kernel = _KERNELS.get(explanation.backend) or functools.partial(_library, explanation.backend)
        if len(self._bindings) >= _MOST_BINDINGS:
            self._bindings.clear()
            self.explanations.clear()
        batch, heads, queries, width = q.shape
        self.explanations[f"{heads}x{queries}x{k.shape[2]}x{width}, batch {batch}"] = explanation
        self._bindings[kind] = kernel
        return kernel


def _triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.fastdistill.attention.triton(q, k, v, 1 / math.sqrt(q.shape[-1]))[0]


def _library(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_sdpa.attention(name, q, k, v, 1 / math.sqrt(q.shape[-1]))


_KERNELS = {
    "triton": _triton,
    "reference": reference,
    attention_sdpa.PLAIN: F.scaled_dot_product_attention,  # what reads the result copies it if it must
}


class Projection(torch.nn.Module):
    """`F.linear` with weights that come from other layers: several side by side, or a 1x1 convolution's."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @classmethod
    def joining(cls, *layers: torch.nn.Linear) -> Projection:
        """The outputs of several linear layers, one after the other."""
        biases = [layer.bias for layer in layers]
        return cls(torch.cat([layer.weight for layer in layers]), None if biases[0] is None else torch.cat(biases))

    @classmethod
    def of_tokens(cls, layer: torch.nn.Linear | torch.nn.Conv2d) -> Projection:
        """A linear layer, or a 1x1 convolution whose pixels are tokens."""
        return cls(layer.weight.flatten(1), layer.bias)


class DirectAttention(torch.nn.Module):
    """Multi-head attention over tokens, the projections that share an input done by one product, read in place.

    The arithmetic of diffusers' `Attention` with `AttnProcessor2_0`, which inspects its processor's signature at every
    call (some 30 microseconds).

    Args:
        attention: an `Attention` for which `why_not_direct` has nothing to say.
        cross: keys and values come from the context; otherwise from the tokens themselves.

    Attributes:
        joint: of the tokens (B, N, C) q, k and v side by side (B, N, 3 * heads * D); of the context k and v.
    """

    def __init__(self, attention, *, cross: bool) -> None:
        super().__init__()
        self.heads = attention.heads
        self.cross = cross
        self.q = attention.to_q if cross else None
        from_context = (attention.to_k, attention.to_v)
        self.joint = Projection.joining(*from_context) if cross else Projection.joining(attention.to_q, *from_context)
        self.out = attention.to_out[0]
        self.attend = BoundAttention()

    def forward(self, tokens: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask=None) -> Tensor:
        if self.cross:
            q = self.q(tokens)
            k, v = self.joint(encoder_hidden_states).chunk(2, dim=-1)
        else:
            q, k, v = self.joint(tokens).chunk(3, dim=-1)
        attended = self.attend(self._split(q), self._split(k), self._split(v))
        return self.out(attended.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, heads * D) -> (B, heads, N, D)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class DirectImageAttention(torch.nn.Module):
    """Self-attention over the pixels of an image with its GroupNorm and residual, as in the VAE's middle block."""

    def __init__(self, attention) -> None:
        super().__init__()
        self.norm = attention.group_norm
        self.attention = DirectAttention(attention, cross=False)
        self.output_scale = float(attention.rescale_output_factor)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        x = x + _to_image(self.attention(_to_tokens(self.norm(x))), x)
        return x if self.output_scale == 1 else x / self.output_scale


class DirectTransformer(torch.nn.Module):
    """`Transformer2DModel` over an image: norm, projection, transformer blocks, projection, residual.

    1x1 convolutions become linear layers on tokens, so that with channels last no pixel is copied on the way in or out.
    """

    def __init__(self, transformer) -> None:
        super().__init__()
        self.norm = transformer.norm
        self.proj_in = Projection.of_tokens(transformer.proj_in)
        self.proj_out = Projection.of_tokens(transformer.proj_out)
        self.transformer_blocks = transformer.transformer_blocks

    def forward(self, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: object) -> tuple[Tensor]:
        tokens = self.proj_in(_to_tokens(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=encoder_hidden_states)
        return (x + _to_image(self.proj_out(tokens), x),)


def _to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C); a view when x is channels last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _to_image(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W), a channels-last view."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)
