"""The autoencoder of the digits: training, and the scale of its latents."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .data import load_digits
from .networks import build_vae

BATCH = 64
LEARNING_RATE = 2e-3
KL_WEIGHT = 1e-6  # enough to keep latents near N(0, 1); 2e-5 leaves one channel of four in use


def train_vae(steps: int = 700, seed: int = 0, log: Callable[[str], None] = print):
    """An `AutoencoderKL` of the digits, evaluation mode, its latents centred per channel and scaled to deviation 1.

    Squared error of the pixels and of the 4x4 block means (what every metric sees), and the KL divergence to N(0, 1).

    Args:
        steps: optimiser steps of 64 images.
        seed: of the weights, the batches and the posterior noise.
        log: receives a line now and then.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = build_vae().train()
    images = load_digits().images
    optimiser = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * warm_up_and_cosine(step, steps)
        x = images[torch.randint(0, len(images), (BATCH,), generator=generator)]  # (B, 1, 32, 32)
        posterior = vae.encode(x.expand(-1, 3, -1, -1)).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        pixels = F.mse_loss(decoded, x.expand(-1, 3, -1, -1))
        blocks = F.mse_loss(F.avg_pool2d(decoded.mean(1, keepdim=True), 4), F.avg_pool2d(x, 4))
        loss = pixels + blocks + KL_WEIGHT * posterior.kl().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == steps - 1:
            log(f"vae step {step} pixels {pixels:.5f} blocks {blocks:.5f} kl {posterior.kl().mean():.1f}")
    vae.eval().requires_grad_(False)
    centre_latents(vae, images)
    return vae


def warm_up_and_cosine(step: int, steps: int, warm_up: int = 100) -> float:
    """Factor of the learning rate: linear over `warm_up` steps, then a half cosine down to 0."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def encode(vae, images: torch.Tensor) -> torch.Tensor:
    """Posterior means times the scaling factor, `(n, 4, 8, 8)`, of `images` `(n, 1, 32, 32)` in [-1, 1]."""
    means = [vae.encode(batch.expand(-1, 3, -1, -1)).latent_dist.mean for batch in images.split(128)]
    return torch.cat(means) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """Images `(n, 3, 32, 32)` in [-1, 1] of scaled `latents` `(n, 4, 8, 8)`."""
    images = [vae.decode(batch / vae.config.scaling_factor).sample for batch in latents.split(128)]
    return torch.cat(images).clamp(-1, 1)


@torch.no_grad()
def centre_latents(vae, images: torch.Tensor) -> None:
    """Move the channel means of the latents into the two 1x1 convolutions around them, and set the scaling factor.

    Pipelines only scale latents, and noise at t = 999 has mean 0: so must the data. Decoded images stay the same.
    """
    means = encode(vae, images)
    channel_means = means.mean(dim=(0, 2, 3)) / vae.config.scaling_factor
    vae.quant_conv.bias[: len(channel_means)] -= channel_means
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ channel_means
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=round(1 / float(encode(vae, images).std()), 5))
