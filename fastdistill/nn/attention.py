"""FusedAttnProcessor: diffusers' `Attention` over `fastdistill.ops.attention`."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastdistill.ops import attention


class FusedAttnProcessor:
    """An attention processor for diffusers: self- and cross-attention of UNets, and the middle block of the VAE.

        unet.set_attn_processor(FusedAttnProcessor())

    Projections are called as the modules they are, so LoRA layers, hooks and changed weights work as ever. What it does
    not know (masks, norms of queries and keys, added projections) it hands to `fallback`, and says so once.

    Args:
        fallback: a diffusers processor; None for `AttnProcessor2_0`.
        backend: forces a backend of `fastdistill.ops.attention`; None lets its choice table decide.
    """

    def __init__(self, fallback: object = None, *, backend: str | None = None) -> None:
        if fallback is None:
            from diffusers.models.attention_processor import AttnProcessor2_0

            fallback = AttnProcessor2_0()
        self.fallback = fallback
        self.backend = backend
        self._said: set[str] = set()

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> Tensor:
        """As diffusers' processors: hidden_states (B, N, C) or (B, C, H, W), encoder_hidden_states (B, M, D)."""
        reason = "an attention mask is given" if attention_mask is not None else _why_not(attn)
        if reason is not None:
            self._say(reason)
            return self.fallback(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        is_image = hidden_states.dim() == 4
        tokens = hidden_states.flatten(2).transpose(1, 2) if is_image else hidden_states  # (B, N, C)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(tokens), attn.to_k(context), attn.to_v(context))
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in projected)  # (B, heads, N, D)
        out = attention(q, k, v, backend=self.backend).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        if is_image:
            out = out.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        if attn.residual_connection:
            out = out + hidden_states
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"FusedAttnProcessor: {type(self.fallback).__name__} serves, because {reason}", stacklevel=3)


def _why_not(attn: torch.nn.Module) -> str | None:
    for extra in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj"):
        if getattr(attn, extra, None) is not None:
            return f"the module has {extra}"
    return None
