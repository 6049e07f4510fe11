"""The parts of a diffusers pipeline that the engine runs, and the check that it can run them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdistill.engine.context import CrossAttentionCache
from fastdistill.models import ModelError


@dataclass
class Components:
    """What one engine owns: passes rewrite these modules in place and set the switches below.

    Attributes:
        unet: `UNet2DConditionModel`.
        decoder, post_quant_conv: of the `AutoencoderKL`; the second is None where the model has none.
        text_encoder, tokenizer, scheduler: as in the pipeline. The scheduler is read for its tables only.
        scaling_factor: latents are divided by it before they are decoded.
        sample_size: (height, width) of the latents that the UNet was made for.
        image_scale: pixels per latent.
        context: set by `cross_attention_cache`: what turns encoded prompts into what the UNet then attends to.
        folded_blocks: set by `fold_timestep`: the residual blocks that take their time embedding as a bias.
        fold_scales, prompt_cache: set by the passes of these names.
        notes: facts about the pipeline that a user should know, for `explain()`.
    """

    unet: torch.nn.Module
    decoder: torch.nn.Module
    post_quant_conv: torch.nn.Module | None
    text_encoder: torch.nn.Module
    tokenizer: Any
    scheduler: Any
    scaling_factor: float
    sample_size: tuple[int, int]
    image_scale: int
    context: CrossAttentionCache | None = None
    folded_blocks: tuple[torch.nn.Module, ...] | None = None
    fold_scales: bool = False
    prompt_cache: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """The two networks that passes rewrite, by the name they have in reports."""
        return {"UNet": self.unet, "VAE decoder": self.decoder}

    def to(self, device: torch.device, dtype: torch.dtype) -> Components:
        for part in (self.unet, self.decoder, self.post_quant_conv, self.text_encoder):
            if part is not None:
                # torch's own `to`: that of diffusers models logs a warning at every change of dtype.
                torch.nn.Module.to(part, device=device, dtype=dtype).eval().requires_grad_(False)
        return self


def take_apart(pipeline, *, own: bool) -> Components:
    """The components of a `StableDiffusionPipeline`.

    Args:
        pipeline: a diffusers pipeline.
        own: True takes its modules over, to be rewritten; False copies what will be rewritten.

    Raises:
        ModelError: a pipeline, UNet or VAE of a kind that this engine does not run.
    """
    _check(pipeline)
    vae, unet = pipeline.vae, pipeline.unet
    parts = {
        "unet": unet,
        "decoder": vae.decoder,
        "post_quant_conv": getattr(vae, "post_quant_conv", None),
        "text_encoder": pipeline.text_encoder,
        "scheduler": pipeline.scheduler,
    }
    if not own:
        parts = copy.deepcopy(parts)
    size = unet.config.sample_size
    notes = ("safety checker: not run",) if getattr(pipeline, "safety_checker", None) is not None else ()
    return Components(
        **parts,
        tokenizer=copy.deepcopy(pipeline.tokenizer),  # its padding and truncation settings are state
        scaling_factor=float(vae.config.scaling_factor),
        sample_size=(size, size) if isinstance(size, int) else tuple(size),
        image_scale=2 ** (len(vae.config.block_out_channels) - 1),
        notes=notes,
    )


def _check(pipeline) -> None:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    if not isinstance(pipeline, StableDiffusionPipeline):
        raise ModelError(f"{type(pipeline).__name__}: this engine runs StableDiffusionPipeline folders only")
    if not isinstance(pipeline.unet, UNet2DConditionModel):
        raise ModelError(f"unet {type(pipeline.unet).__name__}: this engine runs UNet2DConditionModel only")
    if not isinstance(pipeline.vae, AutoencoderKL):
        raise ModelError(f"vae {type(pipeline.vae).__name__}: this engine runs AutoencoderKL only")
    config = pipeline.unet.config
    for name in _INPUTS_WE_DO_NOT_GIVE:
        if config.get(name):
            raise ModelError(f"unet config {name}={config[name]!r}: this engine conditions on time and prompt alone")
    if config.in_channels != pipeline.vae.config.latent_channels:
        raise ModelError(
            f"unet config in_channels={config.in_channels}: needed the VAE's {pipeline.vae.config.latent_channels} "
            "latent channels (inpainting and image-to-image UNets are not run)"
        )


# Each of these adds an input, or changes one, in UNet2DConditionModel.forward; Stable Diffusion has none of them.
_INPUTS_WE_DO_NOT_GIVE = (
    "center_input_sample",
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
    "time_embedding_act_fn",
)
