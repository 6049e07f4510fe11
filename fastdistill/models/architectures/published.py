"""What the authors' configuration files say of the architectures that one-step models are made of.

Stable Diffusion 1.5 and 2.1-base (Rombach et al., arXiv 2112.10752), SDXL (Podell et al., arXiv 2307.01952), SD-Turbo
and SDXL-Turbo (Sauer et al., arXiv 2311.17042). InstaFlow, DMD and DMD2 are SD 1.5 or SDXL with other weights.
"""

from __future__ import annotations

from dataclasses import replace

from .architecture import TEXT_TOKENS, Architecture, Component, Tokenizer

# The three token ids are those of OpenAI's files, which no tokenizer uses: with 2 as the id of the end, the pooled
# token is that with the largest id.
_TEXT = {
    "vocab_size": 49408,
    "max_position_embeddings": TEXT_TOKENS,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_CLIP_L = Component(
    "transformers",
    "CLIPTextModel",
    {
        **_TEXT,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
)
# The last of its 24 layers is left out, so that what the UNet attends to is the second to last, normalised.
_OPEN_CLIP_H = Component(
    "transformers",
    "CLIPTextModel",
    {
        **_TEXT,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "projection_dim": 512,
    },
)
_OPEN_CLIP_BIG_G = Component(
    "transformers",
    "CLIPTextModelWithProjection",
    {
        **_TEXT,
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
)

_CLIP_TOKENIZER = Tokenizer("clip", pad_token="<|endoftext|>")
_OPEN_CLIP_TOKENIZER = Tokenizer("clip", pad_token="!")

_VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}

_SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "attention_head_dim": 8,  # heads; the name is diffusers'
    "cross_attention_dim": 768,
}
_SD21_UNET = {
    **_SD15_UNET,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# Each scheduler takes some of these; the others stay in its configuration for the next one that is made from it.
_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
_EULER_SCHEDULE = {**_SCHEDULE, "interpolation_type": "linear", "sample_max_value": 1.0}
_PNDM = Component("diffusers", "PNDMScheduler", _SCHEDULE)
_EULER = Component("diffusers", "EulerDiscreteScheduler", {**_EULER_SCHEDULE, "timestep_spacing": "leading"})


def _unet(config: dict[str, object]) -> Component:
    return Component("diffusers", "UNet2DConditionModel", config)


def _vae(**changes: object) -> Component:
    return Component("diffusers", "AutoencoderKL", {**_VAE, **changes})


def _turbo(base: Architecture, name: str, scheduler: str) -> Architecture:
    """`base` at 512 pixels with the scheduler of a student that starts at the last timestep."""
    unet = base.networks["unet"]
    at_512 = replace(unet, config={**unet.config, "sample_size": 64})
    trailing = Component("diffusers", scheduler, {**_EULER_SCHEDULE, "timestep_spacing": "trailing"})
    return replace(base, name=name, networks={**base.networks, "unet": at_512}, scheduler=trailing)


SD15 = Architecture(
    "sd15",
    "StableDiffusionPipeline",
    {"unet": _unet(_SD15_UNET), "vae": _vae(), "text_encoder": _CLIP_L},
    _PNDM,
    {"tokenizer": _CLIP_TOKENIZER},
    {"requires_safety_checker": False},
)
SD21 = Architecture(
    "sd21",
    "StableDiffusionPipeline",
    {"unet": _unet(_SD21_UNET), "vae": _vae(sample_size=768), "text_encoder": _OPEN_CLIP_H},
    _PNDM,
    {"tokenizer": _CLIP_TOKENIZER},
    {"requires_safety_checker": False},
)
SDXL = Architecture(
    "sdxl",
    "StableDiffusionXLPipeline",
    {
        "unet": _unet(_SDXL_UNET),
        "vae": _vae(sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPEN_CLIP_BIG_G,
    },
    _EULER,
    {"tokenizer": _CLIP_TOKENIZER, "tokenizer_2": _OPEN_CLIP_TOKENIZER},
    {"force_zeros_for_empty_prompt": True},
)
SD_TURBO = _turbo(SD21, "sd-turbo", "EulerDiscreteScheduler")
SDXL_TURBO = _turbo(SDXL, "sdxl-turbo", "EulerAncestralDiscreteScheduler")
