"""Pictures as the networks behind CLIP score and FID read them: 8-bit RGB, as saved to a file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ._features import as_tensor

Images = Tensor | np.ndarray | Sequence[Image.Image]
"""Tensor (N, 1 or 3, H, W), array (N, H, W, 1 or 3), as diffusers returns them: uint8, or floating in [0, 1]; or PIL
images."""


def as_bytes(images: Images) -> Tensor:
    """(N, 3, H, W) uint8 on the device of `images`; floating values are rounded as diffusers does when it saves them.

    Raises:
        TypeError: another kind of thing. ValueError: another shape, dtype or range, none, or PIL images of two sizes.
    """
    if not isinstance(images, Tensor | np.ndarray):
        return _from_pictures(images)
    tensor = as_tensor(images)
    needed = "(N, 1 or 3, H, W)" if isinstance(images, Tensor) else "(N, H, W, 1 or 3), as numpy images are"
    if tensor.ndim == 4 and isinstance(images, np.ndarray):
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.ndim != 4 or tensor.shape[1] not in (1, 3) or 0 in tensor.shape:
        raise ValueError(f"images: shape {tuple(images.shape)}; needed {needed}")
    if tensor.is_floating_point():
        low, high = (float(value) for value in tensor.aminmax())
        if not (low >= 0 and high <= 1):  # also for NaN
            raise ValueError(
                f"images: values from {low:.4g} to {high:.4g}; needed [0, 1] (from a decoder's [-1, 1]: (x + 1) / 2, "
                "clamped)"
            )
        tensor = (tensor.float() * 255).round().to(torch.uint8)
    elif tensor.dtype != torch.uint8:
        raise ValueError(f"images: dtype {tensor.dtype}; needed uint8, or floating in [0, 1]")
    return tensor.expand(-1, 3, -1, -1)


def as_pictures(images: Images) -> list[Image.Image]:
    """RGB PIL images; those given may have different sizes."""
    if isinstance(images, Tensor | np.ndarray):
        return [Image.fromarray(array) for array in as_bytes(images).permute(0, 2, 3, 1).cpu().numpy()]
    return [picture.convert("RGB") for picture in _pictures(images)]


def _from_pictures(images: Sequence[Image.Image]) -> Tensor:
    pictures = as_pictures(images)
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"images: sizes {', '.join(map(str, sorted(sizes)))}; needed one size")
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def _pictures(images: Sequence[Image.Image]) -> list[Image.Image]:
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    for picture in pictures:
        if not isinstance(picture, Image.Image):
            raise TypeError(f"images: holds {type(picture).__name__}; needed a tensor, an array or PIL images")
    if not pictures:
        raise ValueError("images: none; needed 1 or more")
    return pictures
