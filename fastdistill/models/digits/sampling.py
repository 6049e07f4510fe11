"""The images that every figure of the digits models is measured on."""

from __future__ import annotations

import torch

from .text import prompt


def balanced_labels(per_digit: int = 100) -> torch.Tensor:
    """0, 1, ..., 9, 0, 1, ... `(10 * per_digit,)`, so that every prefix is nearly balanced."""
    return torch.arange(10).repeat(per_digit)


def generate(
    pipeline, labels: torch.Tensor, steps: int, seed: int, guidance_scale: float = 1.0, batch: int = 250
) -> torch.Tensor:
    """Images `(n, 3, 32, 32)` float32 in [-1, 1] that a diffusers pipeline makes of "a handwritten <label>".

    Args:
        pipeline: a digits pipeline, on its device.
        labels: `(n,)` digits to ask for.
        steps: denoising steps.
        seed: of the noise; image i has the same noise for every pipeline and number of steps.
        guidance_scale: 1.0 is off.
        batch: images made at once.
    """
    unet = pipeline.unet
    shape = (len(labels), unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(unet.device, unet.dtype)
    images = [
        pipeline(
            [prompt(int(label)) for label in some],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            latents=latents,
            output_type="pt",
        ).images
        for some, latents in zip(labels.split(batch), noise.split(batch))
    ]
    return torch.cat(images).float().cpu() * 2 - 1
