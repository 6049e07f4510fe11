"""The architectures of the digits pipeline: Stable Diffusion's own classes, made small.

32x32 images, 8x8x4 latents, prompts of at most 24 tokens; together 1.7 M parameters, under 3.6 MB in float16.
Each function returns a network with random weights drawn from torch's global generator.
"""

from __future__ import annotations

IMAGE_SIZE = 32
LATENT_CHANNELS = 4
LATENT_SIZE = 8
TEXT_WIDTH = 64
PROMPT_TOKENS = 24  # start and end tokens included


def build_vae():
    """`AutoencoderKL`, three channels in and out (grey repeated, so that pipelines give RGB pictures).

    Few channels at 32x32, where most of the decoder's time goes.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_unet():
    """`UNet2DConditionModel` as in Stable Diffusion: cross-attention at 8x8 and in the middle only."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 48),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads here
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer):
    """`CLIPTextModel`, two layers of width 64, over the vocabulary of `tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler():
    """`DDIMScheduler` of the teacher: v prediction, zero-terminal SNR, trailing spacing (arXiv 2305.08891).

    An epsilon teacher would amplify its errors 14.65 times at t = 999, where one-step students start.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,  # the last step ends at the clean sample, not at t = 0
        steps_offset=1,  # unused by trailing spacing; pipelines warn about any other value
    )


def build_vit():
    """`ViTForImageClassification` of the ten digits, 0.2 M parameters: 4 blocks of width 64 over 8x8 patches."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=IMAGE_SIZE,
            patch_size=4,  # one pixel of the original 8x8 digits
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            initializer_range=0.1,  # trunc_normal of 0.02 is for wide ones; with it the loss stays where it is at first
            layer_norm_eps=1e-6,
            num_labels=10,
            id2label={digit: str(digit) for digit in range(10)},
            label2id={str(digit): digit for digit in range(10)},
        )
    )
