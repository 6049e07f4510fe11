"""The teacher of the digits: a latent diffusion model and its text encoder, trained together from nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .data import load_digits
from .folder import assemble
from .metrics import accuracy, frechet
from .networks import build_scheduler, build_text_encoder, build_unet
from .sampling import balanced_labels, generate
from .text import build_tokenizer, random_caption
from .train_vae import encode, warm_up_and_cosine

BATCH = 64
LEARNING_RATE = 1e-3
EMA_DECAY = 0.999
CAPTION_DROPOUT = 0.1  # to the empty prompt, so that guidance has an unconditional branch


def train_teacher(
    vae,
    steps: int = 4000,
    seed: int = 0,
    log: Callable[[str], None] = print,
    report_every: int = 400,
    on_report: Callable[[object], None] | None = None,
):
    """A `StableDiffusionPipeline` around `vae` whose UNet predicts v under a zero-terminal-SNR schedule.

    Mean squared error of v at uniform timesteps (arXiv 2202.00512, 2305.08891) on latents encoded once; the weights
    returned are exponential averages.

    Args:
        vae: from `train_vae`.
        steps: optimiser steps of 64 latents.
        seed: of the weights, the batches, the noise and the captions.
        log: receives a line every 100 steps, and the figures of 500 images at 10 steps at each report.
        report_every: steps between reports.
        on_report: called at each report with the averaged pipeline, to save what there is so far.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    words = random.Random(seed)
    images, labels = load_digits()
    latents = encode(vae, images)
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    networks = torch.nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}).train()
    averaged = AveragedModel(networks, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimiser = torch.optim.AdamW(networks.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    running = None
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * warm_up_and_cosine(step, steps)
        chosen = torch.randint(0, len(latents), (BATCH,), generator=generator)
        x0 = latents[chosen]  # (B, 4, 8, 8)
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
        x_t, v = scheduler.add_noise(x0, noise, t), scheduler.get_velocity(x0, noise, t)
        asked = [
            "" if words.random() < CAPTION_DROPOUT else random_caption(digit, words)
            for digit in labels[chosen].tolist()
        ]
        prompt_embeds = networks["text_encoder"](tokenize(tokenizer, asked))[0]  # (B, 24, 64)
        loss = F.mse_loss(networks["unet"](x_t, t, encoder_hidden_states=prompt_embeds).sample, v)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimiser.step()
        averaged.update_parameters(networks)
        running = float(loss.detach()) if running is None else 0.99 * running + 0.01 * float(loss.detach())
        if step % 100 == 0:
            log(f"teacher step {step} loss {running:.4f}")
        if (step + 1) % report_every == 0:
            _report(step, _pipeline(vae, tokenizer, averaged.module, scheduler), log, on_report)
    return _pipeline(vae, tokenizer, averaged.module, scheduler)


def _report(step: int, pipeline, log: Callable[[str], None], on_report: Callable[[object], None] | None) -> None:
    wanted = balanced_labels(50)
    made = generate(pipeline, wanted, steps=10, seed=1)
    log(f"teacher step {step} FD {frechet(made):.3f} accuracy {accuracy(made, wanted):.3f} (500 images)")
    if on_report is not None:
        on_report(pipeline)


def tokenize(tokenizer, prompts: list[str]) -> torch.Tensor:
    """Token ids `(n, 24)` int64, padded and cut as `StableDiffusionPipeline` does it."""
    return tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def _pipeline(vae, tokenizer, networks, scheduler):
    frozen = copy.deepcopy(networks).eval().requires_grad_(False)
    return assemble(vae, tokenizer, frozen["text_encoder"], frozen["unet"], scheduler)
