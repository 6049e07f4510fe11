"""Samples of a student as it stands, and of its teacher: the same noise every time, no other random number touched."""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .pipelines import student_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def sampler_of(
    teacher: DiffusionPipeline, student: nn.Module | None = None, scheduler: Any = None
) -> DiffusionPipeline:
    """A quiet pipeline with the teacher's other parts, which are shared, and without safety checker and watermark.

    Args:
        teacher: a text-to-image pipeline.
        student, scheduler: None takes the teacher's own network, and a copy of its scheduler.
    """
    pipeline = student_pipeline(
        teacher,
        teacher.unet if student is None else student,
        copy.deepcopy(teacher.scheduler) if scheduler is None else scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)
    if getattr(pipeline, "watermark", None) is not None:
        pipeline.watermark = None
    return pipeline


def sample(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 50,
) -> Tensor:
    """Images (N, 3, H, W) float32 in [-1, 1] on the CPU, one of each prompt.

    Args:
        pipeline: of the kind of Stable Diffusion 1, 2 or XL, on its device.
        steps, guidance_scale: how it is sampled; 1.0 is no guidance.
        seed: of the noise. Image i starts from the same noise for every pipeline of this latent shape, and number of
            steps. Schedulers that draw more numbers draw from a generator of their own.
        batch_size: images made at once.
    """
    options = {"steps": steps, "guidance_scale": guidance_scale, "seed": seed, "batch_size": batch_size}
    return torch.cat([images for _, images in sample_batches(pipeline, prompts, **options)])


def sample_batches(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 50,
    chosen: Container[int] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """`sample`, batch by batch: the number of the batch, and its images.

    chosen: numbers of the batches to make, which are the same whichever others are made; None is all.
    """
    unet = pipeline.unet
    side = unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    shape = (unet.config.in_channels, height, width)
    # A network that is held in bfloat16 while others are not computes as it does in training.
    bfloat16 = torch.autocast(unet.device.type, torch.bfloat16, enabled=unet.dtype == torch.bfloat16)
    with at_hand(pipeline):
        for number, noise in enumerate(_noise(len(prompts), shape, seed, batch_size)):
            if chosen is not None and number not in chosen:
                continue
            first = number * batch_size
            with torch.no_grad(), bfloat16:
                images = pipeline(
                    list(prompts[first : first + batch_size]),
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    latents=noise.to(unet.device, unet.dtype),
                    height=height * pipeline.vae_scale_factor,
                    width=width * pipeline.vae_scale_factor,
                    generator=torch.Generator().manual_seed(seed * 1_000_003 + first + 1),
                    output_type="pt",
                ).images
            yield number, images.float().cpu() * 2 - 1


def _noise(count: int, shape: tuple[int, ...], seed: int, batch_size: int) -> Iterator[Tensor]:
    """`torch.randn(count, *shape)` of a seed in batches, of which no more than one need be in memory."""
    generator = torch.Generator().manual_seed(seed)
    if math.prod(shape) % 16:  # torch draws 16 numbers at a time: another split would be other numbers
        yield from torch.randn(count, *shape, generator=generator).split(batch_size)
        return
    for first in range(0, count, batch_size):
        yield torch.randn(min(batch_size, count - first), *shape, generator=generator)


@contextmanager
def at_hand(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within, parts of the pipeline that wait on the host are on its UNet's device."""
    device = pipeline.unet.device
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    away = [network for network in networks if _device(network) not in (None, device)]
    for part in away:
        part.to(device)
    try:
        yield
    finally:
        for part in away:
            part.to("cpu")


def _device(network: nn.Module) -> torch.device | None:
    return next((p.device for p in network.parameters()), None)
