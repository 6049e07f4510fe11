"""FusedAttnProcessor: diffusers' `Attention` over `fastdistill.ops.attention`."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastdistill.nn.joint import linears
from fastdistill.ops import attention


class FusedAttnProcessor:
    """An attention processor for diffusers: self- and cross-attention of UNets, and the middle block of the VAE.

        unet.set_attn_processor(FusedAttnProcessor())
        join_projections(unet)

    Queries, keys and values of self-attention come from one matrix product, keys and values of cross-attention from
    one, where `fastdistill.nn.join_projections` (or `patch`) has moved the weights side by side. The joint matrix is
    the memory of the layers' own parameters, looked up at every call: a changed weight is seen, whoever changed it.
    Projections that are no plain linear layers (LoRA, quantised, with hooks), or that lie elsewhere, are called as the
    modules they are, and each is a product of its own under autocast and `torch.compile`.

    What it does not know (masks, IP-Adapter inputs, norms of queries and keys, added projections) it hands to
    `fallback`, and says so once.

    Args:
        fallback: a diffusers processor without parameters of its own; None for `AttnProcessor2_0`. Of the
            `cross_attention_kwargs`, diffusers gives a processor those that its signature names: here
            `ip_adapter_masks`.
        backend: forces a backend of `fastdistill.ops.attention`; None lets its choice table decide.

    Raises:
        TypeError: `fallback` is a module, whose parameters the model would not find inside this object.
    """

    def __init__(self, fallback: object = None, *, backend: str | None = None) -> None:
        if fallback is None:
            from diffusers.models.attention_processor import AttnProcessor2_0

            fallback = AttnProcessor2_0()
        if isinstance(fallback, torch.nn.Module):
            raise TypeError(
                f"fallback: {type(fallback).__name__} is a module, whose parameters a model would not find in here; "
                "set it on the attention itself, which patch then leaves alone"
            )
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
        ip_adapter_masks: object = None,
        **kwargs: object,
    ) -> Tensor:
        """As diffusers' processors: hidden_states (B, N, C) or (B, C, H, W), encoder_hidden_states (B, M, D)."""
        reason = _why_not_these(encoder_hidden_states, attention_mask, ip_adapter_masks, args, kwargs) or _why_not(attn)
        if reason is not None:
            self._say(reason)
            if ip_adapter_masks is not None:
                kwargs["ip_adapter_masks"] = ip_adapter_masks
            return self.fallback(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        is_image = hidden_states.dim() == 4
        tokens = hidden_states.flatten(2).transpose(1, 2) if is_image else hidden_states  # (B, N, C)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            projected = linears(tokens, (attn.to_q, attn.to_k, attn.to_v))
        else:
            projected = (attn.to_q(tokens), *linears(encoder_hidden_states, (attn.to_k, attn.to_v)))
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


def _why_not_these(context: object, mask: object, ip_adapter_masks: object, args: tuple, kwargs: dict) -> str | None:
    if mask is not None:
        return "an attention mask is given"
    if ip_adapter_masks is not None and context is not None:  # self-attention has no image tokens to mask
        return "IP-Adapter masks are given"
    if context is not None and not isinstance(context, Tensor):
        return f"encoder_hidden_states is a {type(context).__name__}, as an IP-Adapter wants it"
    if args or kwargs:
        return f"it is called with {', '.join(map(str, kwargs)) or 'more arguments'}"
    return None


def _why_not(attn: torch.nn.Module) -> str | None:
    for extra in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj"):
        if getattr(attn, extra, None) is not None:
            return f"the module has {extra}"
    return None
