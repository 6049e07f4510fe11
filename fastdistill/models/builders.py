"""Pipelines of the published architectures with random weights: for tests, benchmarks and training from nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .loading import quiet_libraries

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    from .architectures import Architecture, Tokenizer


def build(
    name: str,
    weights: str = "random",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A diffusers pipeline of an architecture by name, complete with tokenizers and the published scheduler.

    Args:
        name: a key of `ARCHITECTURES`: sd15, sd21, sdxl, sd-turbo, sdxl-turbo, or one of these with "-tiny".
        weights: "random", the only ones there are; `load_pipeline` opens a folder that holds some.
        seed: of the weights. They depend on it and on the kind of device, and the dtype only rounds them. No global
            generator is used.
        dtype: of all weights; None is float32.
        device: to build on. "meta" gives a pipeline without weights.

    Returns:
        a pipeline in eval mode, its progress bar and watermark off, without safety checker.

    Raises:
        ModelError: an unknown name; the known ones are listed, the most similar first.
        ValueError: other weights.
    """
    from .architectures import find_architecture

    architecture = find_architecture(name)
    if weights != "random":
        raise ValueError(
            f'weights={weights!r}: needed "random"; none come with an architecture and none are downloaded. '
            "load_pipeline(folder) opens a pipeline that has its own"
        )
    return random_pipeline(architecture, seed, dtype, device)


def random_pipeline(
    architecture: Architecture,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """`build` of an architecture that has no name, but tokenizers."""
    import torch

    from .architectures import build_networks
    from .architectures.random_weights import fill

    with torch.device(device):
        networks = build_networks(architecture, dtype or torch.float32)
    if torch.device(device).type != "meta":
        for name, network in networks.items():
            fill(network, name, seed)
    tokens = architecture.text_tokens
    tokenizers = {name: _tokenizer(each, tokens) for name, each in architecture.tokenizers.items()}
    with quiet_libraries():
        import diffusers

        scheduler = getattr(diffusers, architecture.scheduler.class_name).from_config(architecture.scheduler.config)
        optional = {
            "StableDiffusionPipeline": {"safety_checker": None, "feature_extractor": None},
            "StableDiffusionXLPipeline": {"add_watermarker": False},
        }
        pipeline = getattr(diffusers, architecture.pipeline)(
            **networks,
            **tokenizers,
            scheduler=scheduler,
            **optional[architecture.pipeline],
            **architecture.options,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tokenizer(tokenizer: Tokenizer, tokens: int) -> CLIPTokenizer:
    from .clip_tokenizer import build_tokenizer, clip_merges
    from .digits.text import caption_merges

    merges = clip_merges() if tokenizer.vocabulary == "clip" else caption_merges()
    return build_tokenizer(merges, tokens, tokenizer.pad_token)
