"""Small Stable Diffusion pipelines with random weights: diffusers' and transformers' own classes, seconds to run."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from fastdistill.models.digits.text import build_tokenizer

TEXT_WIDTH = 24


def randomise(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random norm weights and biases everywhere: a pass that forgets one must not get away with a default 1 or 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise)
    return network.eval().requires_grad_(False)


def build_unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    """As SD 1.5 in small: 10 and 20 channels per group (320 / 32 = 10), 5 and 4 channels per head."""
    config = {
        "sample_size": 8,
        "block_out_channels": (40, 80),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": (8, 4),
        "norm_num_groups": 4,
    }
    torch.manual_seed(seed)
    return randomise(UNet2DConditionModel(**{**config, **changes}), seed)


def build_vae(seed: int = 1, **changes) -> AutoencoderKL:
    """As Stable Diffusion's in small: 16 and 24 channels, two pixels per latent."""
    config = {
        "block_out_channels": (16, 24),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    torch.manual_seed(seed)
    return randomise(AutoencoderKL(**{**config, **changes}), seed)


def build_text_encoder(tokenizer, seed: int = 2) -> CLIPTextModel:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return randomise(CLIPTextModel(config), seed)


def v_prediction_ddim(**changes) -> DDIMScheduler:
    """The scheduler of the bundled models."""
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    }
    return DDIMScheduler(**{**config, **changes})


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_pipeline(tokenizer):
    """`make_pipeline(scheduler=None, **parts)`: a StableDiffusionPipeline of fresh random networks."""

    def make(scheduler=None, **parts) -> StableDiffusionPipeline:
        components = {
            "unet": build_unet(),
            "vae": build_vae(),
            "text_encoder": build_text_encoder(tokenizer),
            "tokenizer": tokenizer,
            "scheduler": v_prediction_ddim(),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        pipeline = StableDiffusionPipeline(**{**components, **parts})
        pipeline.scheduler = scheduler or pipeline.scheduler  # the constructor would change its settings
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture(scope="session")
def diffusers_pipeline(make_pipeline):
    """The default one; nobody may change it."""
    return make_pipeline()


@pytest.fixture(scope="session")
def folder(diffusers_pipeline, tmp_path_factory):
    """The same as a folder on disk."""
    path = tmp_path_factory.mktemp("model") / "small"
    diffusers_pipeline.save_pretrained(path, safe_serialization=True)
    return path
