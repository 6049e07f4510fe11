"""`UNet2DConditionModel.forward` for time and prompt alone, with the time embedding as an argument.

The UNet's own blocks do the work. What is left out is what Stable Diffusion never uses: class labels, added
conditions, adapters, control nets, masks (`components.take_apart` refuses models that need one of them).
"""

from __future__ import annotations

import torch
from torch import Tensor


def time_embedding(unet, timestep: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """(batch, D) the embedding of one timestep () as the residual blocks receive it."""
    features = unet.time_proj(timestep.reshape(1).expand(batch))  # float32, whatever the model's dtype
    return unet.time_embedding(features.to(dtype))


def unet_forward(unet, x: Tensor, time: Tensor | tuple[Tensor, ...], context: Tensor) -> Tensor:
    """What the network predicts: (B, C, H, W) like x.

    Args:
        unet: a `UNet2DConditionModel`, rewritten by passes or not.
        x: (B, C, H, W) noisy latents.
        time: (B, D) from `time_embedding`, or one bias per residual block where the timestep was folded.
        context: (B, tokens, D) the encoded prompt, or what a `CrossAttentionCache` made of it where one was applied.
    """
    # Sizes that do not halve evenly all the way down: each upsampling is told the size of its skip connection.
    uneven = any(size % 2**unet.num_upsamplers for size in x.shape[-2:])
    x = unet.conv_in(x)
    skips = (x,)
    for block in unet.down_blocks:
        x, outputs = _block(block, x, time, context)
        skips += outputs
    if unet.mid_block is not None:
        x = _block(unet.mid_block, x, time, context)
    for block in unet.up_blocks:
        count = len(block.resnets)
        skips, used = skips[:-count], skips[-count:]
        options = {"upsample_size": skips[-1].shape[2:]} if uneven and skips else {}
        x = _block(block, x, time, context, res_hidden_states_tuple=used, **options)
    if unet.conv_norm_out is not None:
        x = unet.conv_act(unet.conv_norm_out(x))
    return unet.conv_out(x)


def _block(block, x: Tensor, time, context: Tensor, **skips):
    if getattr(block, "has_cross_attention", False):
        return block(x, temb=time, encoder_hidden_states=context, **skips)
    return block(x, temb=time, **skips)
