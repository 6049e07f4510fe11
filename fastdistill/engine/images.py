"""From latents to pictures: the decoder, and the three forms in which images are returned."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdistill.engine.components import Components

OUTPUTS = ("pil", "np", "pt")


def decode(components: Components, latents: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1], float32 (float64 from float64), from latents already divided by the VAE's scale."""
    if components.post_quant_conv is not None:
        latents = components.post_quant_conv(latents)
    image = components.decoder(latents)
    wide = torch.promote_types(image.dtype, torch.float32)
    return image.to(wide).mul(0.5).add_(0.5).clamp_(0, 1)


def to_bytes(image: Tensor) -> Tensor:
    """(B, H, W, 3) uint8, rounded half to even as diffusers does, from (B, 3, H, W) in [0, 1]."""
    return image.mul(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """One RGB (or, of one channel, grey) picture per row of (B, H, W, C) uint8."""
    arrays = pixels.cpu().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def to_numpy(image: Tensor) -> np.ndarray:
    """(B, H, W, 3) in [0, 1] from (B, 3, H, W)."""
    return np.ascontiguousarray(image.cpu().permute(0, 2, 3, 1).numpy())
