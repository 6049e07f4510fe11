"""diffusers' modules over the fused ops: the classes that `fastdistill.nn.patch` gives to a model's modules.

A module becomes one of these by a change of its class alone (`replaces` says from which): its parameters, buffers,
hooks, names and state dict stay what they are, and giving the old class back restores it exactly.
"""

from __future__ import annotations

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from fastdistill.nn.group_norm_silu import GroupNormSiLU
from fastdistill.nn.joint import join_where_it_pays
from fastdistill.nn.layer_norm import LayerNorm
from fastdistill.ops import geglu


class PatchedGroupNorm(GroupNormSiLU):
    replaces = torch.nn.GroupNorm
    silu = False
    backend = None


class PatchedGroupNormSiLU(GroupNormSiLU):
    """With the SiLU of the module that follows it."""

    replaces = torch.nn.GroupNorm
    silu = True
    backend = None


class PatchedSiLU(torch.nn.Identity):
    """A SiLU that the norm in front of it has applied already."""

    replaces = torch.nn.SiLU


class PatchedLayerNorm(LayerNorm):
    replaces = torch.nn.LayerNorm
    backend = None


class PatchedGEGLU(GEGLU):
    replaces = GEGLU

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return geglu(self.proj(hidden_states))


class PatchedAttention(Attention):
    """Its projections lie side by side in memory where it pays, also after it was moved (`.to()`) or copied."""

    replaces = Attention

    def _apply(self, *args: object, **kwargs: object) -> PatchedAttention:
        super()._apply(*args, **kwargs)
        join_where_it_pays(self)
        return self

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        join_where_it_pays(self)


class PatchedResnetBlock2D(ResnetBlock2D):
    """Both norms with their SiLU, the time embedding added inside the second; no division by 1, and no copy of a
    channels-last image in front of the shortcut."""

    replaces = ResnetBlock2D

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *_: object, **__: object) -> Tensor:
        h = self._norm1_conv1(input_tensor)
        h = self._norm2_conv2(h, self._time(temb))
        x = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return x + h if self.output_scale_factor == 1 else (x + h) / self.output_scale_factor

    def _norm1_conv1(self, x: Tensor) -> Tensor:
        return self.conv1(self.norm1(x))

    def _norm2_conv2(self, x: Tensor, time: Tensor | None) -> Tensor:
        return self.conv2(self.dropout(self.norm2(x, time)))

    def _time(self, temb: Tensor | None) -> Tensor | None:
        """(B, C) what every pixel gets in front of norm2."""
        if temb is None or self.time_emb_proj is None:
            return temb
        return self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))


class PatchedTransformerBlock(BasicTransformerBlock):
    """The residual sums of both attentions inside the LayerNorm that follows them."""

    replaces = BasicTransformerBlock

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, object] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if cross_attention_kwargs or self._chunk_size is not None:
            return BasicTransformerBlock.forward(
                self,
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        context = encoder_hidden_states if self.only_cross_attention else None
        # Of a contiguous image the tokens are a transposed view, which every linear layer would copy by itself.
        h = hidden_states.contiguous()
        out = self._attend_to_itself(h, context, attention_mask)
        if self.attn2 is not None:
            out, h = self._attend_to_context(out, h, encoder_hidden_states, encoder_attention_mask)
        return self._feed_forward(out, h)

    def _attend_to_itself(self, h: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        return self.attn1(self.norm1(h), encoder_hidden_states=context, attention_mask=mask)

    def _attend_to_context(
        self, out: Tensor, h: Tensor, context: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the attention adds to out + h, and out + h."""
        y, h = self.norm2(out, residual=h)
        return self.attn2(y, encoder_hidden_states=context, attention_mask=mask), h

    def _feed_forward(self, out: Tensor, h: Tensor) -> Tensor:
        y, h = self.norm3(out, residual=h)
        return self.ff(y) + h
