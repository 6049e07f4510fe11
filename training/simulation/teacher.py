"""Teachers without memory: of an architecture, or copied from one that is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdistill.models.architectures import Architecture

from ..condition import Condition
from ..teacher import Teacher
from .fakes import Weightless, converted_in_place, fake_copy


class PlannedPipeline:
    """What `Teacher` and the methods ask of a diffusers pipeline: its parts, and how pixels and latents are related."""

    def __init__(self, components: dict[str, Any], vae_scale_factor: int, config: dict[str, Any]) -> None:
        self.components, self.vae_scale_factor, self.config = components, vae_scale_factor, config
        vars(self).update(components)

    def register_modules(self, **parts: Any) -> None:
        self.components |= parts
        vars(self).update(parts)


class PlannedTeacher(Teacher):
    """A teacher whose networks are fake; its text encoders are there to be counted alone.

    Args:
        pipeline: with a scheduler, and fake networks, on the CPU.
        fake: the mode of their tensors.
        like: a condition of one prompt, whose shapes all have.
    """

    def __init__(self, pipeline: PlannedPipeline, fake: FakeTensorMode, like: Condition) -> None:
        with converted_in_place():
            super().__init__(pipeline)
        self.fake, self._like = fake, like

    def encode(self, prompts: Sequence[str], batch_size: int = 256) -> Condition:
        with self.fake:
            return self._like.map(lambda t: torch.empty(len(prompts), *t.shape[1:], dtype=t.dtype))

    @property
    def name(self) -> str:
        return "planned"


def teacher_of(architecture: Architecture, fake: FakeTensorMode, resolution: int | None = None) -> PlannedTeacher:
    """Of a published architecture, or of a folder's.

    Args:
        resolution: pixels of a side; None is what the UNet was made for.

    Raises:
        ValueError: a resolution that the architecture cannot have.
    """
    import diffusers

    from fastdistill.models.architectures import build_networks

    with Weightless(fake):
        networks = build_networks(architecture, torch.float32)
    unet, scale = networks["unet"], architecture.pixels_per_latent
    if resolution is not None:
        deepest = scale << (len(unet.config.block_out_channels) - 1)
        if resolution < deepest or resolution % deepest:
            raise ValueError(f"resolution {resolution}: needed a multiple of {deepest} pixels for {architecture.name}")
        unet.register_to_config(sample_size=resolution // scale)
    scheduler = getattr(diffusers, architecture.scheduler.class_name).from_config(dict(architecture.scheduler.config))
    pipeline = PlannedPipeline(
        {**networks, "scheduler": scheduler, "tokenizer": "none"}, scale, dict(architecture.options)
    )
    return PlannedTeacher(pipeline, fake, _condition(architecture, networks["text_encoder"]))


def copy_of(teacher: Teacher, fake: FakeTensorMode) -> PlannedTeacher:
    """A fake copy of a teacher that is loaded, which is not changed and not called but for one prompt."""
    parts = {
        name: fake_copy(fake, part) if isinstance(part, nn.Module) else part
        for name, part in teacher.pipeline.components.items()
    }
    pipeline = PlannedPipeline(parts, teacher.pipeline.vae_scale_factor, dict(teacher.pipeline.config))
    return PlannedTeacher(pipeline, fake, teacher.encode([""]).to("cpu"))


def _condition(architecture: Architecture, text_encoder: nn.Module) -> Condition:
    pooled = architecture.pooled_width or text_encoder.config.hidden_size
    return Condition(
        torch.empty(1, architecture.text_tokens, architecture.text_width),
        torch.empty(1, pooled),
        torch.empty(1, 6) if architecture.is_sdxl else None,
    )
