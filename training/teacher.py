"""A teacher: a diffusers pipeline, and what training asks of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.diffusion import Schedule

from .adapters import AdapterRole, SharedBase
from .condition import Condition, cat
from .pipelines import check_teacher, weights_digest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Teacher:
    """A text-to-image pipeline like Stable Diffusion 1, 2 or XL, frozen and float32, its UNet channels last.

    Args:
        source: a bundled name, a pipeline folder, a loaded diffusers pipeline, or another `Teacher`.
        device: to compute on; None leaves the pipeline where it is (the CPU for a name or a folder).

    Attributes:
        pipeline, folder: what was loaded, and from where (None for a pipeline that was given).
        device: to compute on; parts that a stage does not use may wait on the host.
        schedule, prediction_type: of its scheduler, on the device.

    Raises:
        TeacherError: a pipeline of a kind that cannot be distilled here.
        fastdistill.models.ModelError: an unknown name or an unreadable folder.
    """

    def __init__(
        self, source: str | Path | DiffusionPipeline | Teacher, device: str | torch.device | None = None
    ) -> None:
        self.folder: Path | None = None
        if isinstance(source, Teacher):
            self.folder, source = source.folder, source.pipeline
        elif isinstance(source, (str, Path)):
            from fastdistill.models import load_pipeline, resolve_model

            self.folder = resolve_model(source)
            source = load_pipeline(self.folder)
        check_teacher(source)
        if device is not None:
            source.to(device)
        for part in source.components.values():
            if isinstance(part, nn.Module):
                part.float().eval().requires_grad_(False)
        # 0.075 s against 0.106 s for a forward of the digits' UNet at batch 64 on one CPU core.
        source.unet.to(memory_format=torch.channels_last)
        self.pipeline = source
        self.device: torch.device = source.unet.device
        self.schedule: Schedule = diffusion.from_scheduler(source.scheduler).to(self.device)
        self.prediction_type = diffusion.prediction_type_of(source.scheduler)

    @property
    def unet(self) -> nn.Module:
        return self.pipeline.unet

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent at the size that the UNet was made for."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet takes pooled text and sizes."""
        return self.unet.config.get("addition_embed_type") == "text_time"

    @property
    def name(self) -> str:
        return type(self.pipeline).__name__ if self.folder is None else self.folder.name

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 256) -> Condition:
        """The condition of P prompts, float32; sizes, where the UNet takes them, are those of an uncropped image."""
        prompts = list(prompts)
        return cat([self._encode(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)])

    @cached_property
    def unconditional(self) -> Condition:
        """Of one sample: of the empty prompt, or zeros where the pipeline says so, as SDXL's does."""
        empty = self.encode([""])
        if self.is_sdxl and self.pipeline.config.get("force_zeros_for_empty_prompt", True):
            empty = Condition(torch.zeros_like(empty.states), torch.zeros_like(empty.pooled), empty.time_ids)
        return empty

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in about [-1, 1], differentiable, of scaled latents (B, C, h, w)."""
        vae = self.pipeline.vae
        return vae.decode(latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)).sample

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1].

        noise: (B, C, h, w) to sample the posterior with; None takes its mean.
        """
        vae = self.pipeline.vae
        posterior = vae.encode(images).latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return (latents - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor

    @contextmanager
    def shared(self, rank: int | None) -> Iterator[None]:
        """Within, the UNet is a base whose copies are adapters of this rank; with None it is as it was."""
        if rank is None:
            yield
            return
        base = SharedBase(self.unet, rank)
        self.pipeline.register_modules(unet=base.role(None))
        try:
            yield
        finally:
            self.pipeline.register_modules(unet=base.remove())

    def park(self, used: Iterable[nn.Module]) -> None:
        """Move networks of the pipeline to the host that are neither among the `used` ones nor a part of one."""
        for part in self.idle(used):
            part.to("cpu")

    def unpark(self) -> None:
        """All networks on the device again."""
        for part in self.networks():
            part.to(self.device)

    def idle(self, used: Iterable[nn.Module]) -> list[nn.Module]:
        """Networks of the pipeline that are neither among the `used` ones nor a part of one."""
        kept = {id(part) for network in used for part in network.modules()}
        return [part for part in self.networks() if id(part) not in kept and not isinstance(part, AdapterRole)]

    def networks(self) -> list[nn.Module]:
        """Of the pipeline."""
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    def facts(self) -> dict:
        """What is written beside a student, to tell which teacher it had."""
        return {"name": self.name, "unet_sha256": weights_digest(self.unet)}

    def _encode(self, prompts: list[str]) -> Condition:
        if self.is_sdxl:
            states, _, pooled, _ = self.pipeline.encode_prompt(
                prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            height, width = (side * self.pipeline.vae_scale_factor for side in self.sample_shape[1:])
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=self.device)
            return Condition(states.float(), pooled.float(), sizes.repeat(len(prompts), 1))
        # What the pipeline's encode_prompt does, which does not give the pooled embedding.
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        tokens = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).to(self.device)
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        encoded = encoder(tokens.input_ids, attention_mask=mask)
        return Condition(encoded.last_hidden_state.float(), encoded.pooler_output.float())
