"""The published architectures by name: what their authors' configuration files say, without weights.

Stable Diffusion 1.5 and 2.1 (Rombach et al., arXiv 2112.10752), SDXL (Podell et al., arXiv 2307.01952), and the
autoencoder that they share. SD-Turbo, SDXL-Turbo, InstaFlow, DMD and DMD2 are these with other weights.
"""

from __future__ import annotations

import torch

_SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "attention_head_dim": 8,  # heads; the name is diffusers'
    "cross_attention_dim": 768,
}

UNETS: dict[str, dict[str, object]] = {
    "sd15": _SD15,
    "sd21": {
        **_SD15,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
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
    },
}
"""Arguments of `diffusers.UNet2DConditionModel`; what is not named has its default."""

VAE: dict[str, object] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
"""Arguments of `diffusers.AutoencoderKL`: 8 x 8 pixels to 4 latent channels."""

TEXT_TOKENS = 77
_POOLED_TEXT, _TIME_IDS = 1280, 6


def unet_inputs(name: str, batch: int, resolution: int, dtype: torch.dtype) -> dict[str, object]:
    """Arguments of the UNet's forward: random latents of `resolution` pixels, and conditions of the right sizes.

    Raises:
        ValueError: `name` is not an architecture, `resolution` is not a multiple of 8.
    """
    if name not in UNETS:
        raise ValueError(f"name={name!r}: unknown architecture; known: {', '.join(UNETS)}")
    if resolution < 8 or resolution % 8:
        raise ValueError(f"resolution={resolution}: must be a positive multiple of 8 pixels")
    config = UNETS[name]
    inputs: dict[str, object] = {
        "sample": torch.randn(batch, 4, resolution // 8, resolution // 8, dtype=dtype),
        "timestep": torch.full((batch,), 999),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, config["cross_attention_dim"], dtype=dtype),
    }
    if config.get("addition_embed_type") == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, _POOLED_TEXT, dtype=dtype),
            "time_ids": torch.full((batch, _TIME_IDS), float(resolution), dtype=dtype),
        }
    return inputs
