"""The published architectures made small: the same classes, blocks and options, so that a picture takes no second.

Levels, layers per block, which blocks attend, the kinds of projections and activations, pooled text and sizes are those
of the large ones. Only sizes, widths, numbers of heads and groups, the depth of stacks and the vocabulary are smaller.
"""

from __future__ import annotations

from dataclasses import replace

from .architecture import TIME_IDS, Architecture, Component

# Tokens of the captions of the digits; these words suffice to make pipelines read prompts.
SMALL_VOCABULARY = 664
_SHRINK = 8  # of the pictures' sides

_UNET = {"norm_num_groups": 8}
_UNETS = {
    "sd15": {**_UNET, "block_out_channels": (16, 32, 64, 64), "attention_head_dim": 2, "cross_attention_dim": 24},
    "sd21": {
        **_UNET,
        "block_out_channels": (16, 32, 64, 64),
        "attention_head_dim": (2, 4, 8, 8),
        "cross_attention_dim": 32,
    },
    "sdxl": {
        **_UNET,
        "block_out_channels": (16, 32, 64),
        "attention_head_dim": (2, 4, 8),
        "transformer_layers_per_block": (1, 2, 3),
        "cross_attention_dim": 24 + 40,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": TIME_IDS * 8 + 40,
    },
}
_VAE = {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 4}


def _text(width: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "vocab_size": SMALL_VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
    }


_TEXTS = {
    "sd15": {"text_encoder": _text(24, layers=2, heads=2)},
    "sd21": {"text_encoder": _text(32, layers=3, heads=4)},
    "sdxl": {"text_encoder": _text(24, layers=2, heads=2), "text_encoder_2": _text(40, layers=3, heads=5)},
}


def tiny(architecture: Architecture, family: str) -> Architecture:
    """The small one of an architecture of `family` "sd15", "sd21" or "sdxl", by its name and "-tiny"."""
    changes = {"unet": _UNETS[family], "vae": _VAE, **_TEXTS[family]}
    networks = {name: _changed(network, changes[name]) for name, network in architecture.networks.items()}
    tokenizers = {name: replace(each, vocabulary="small") for name, each in architecture.tokenizers.items()}
    return replace(architecture, name=f"{architecture.name}-tiny", networks=networks, tokenizers=tokenizers)


def _changed(network: Component, changes: dict[str, object]) -> Component:
    config = {**network.config, **changes}
    if "sample_size" in config:
        config["sample_size"] //= _SHRINK
    return replace(network, config=config)
