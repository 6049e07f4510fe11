"""The published architectures by name, small ones of the same structure, and those of pipeline folders; no weights.

Importing this is light: torch, diffusers and transformers are imported when a network is built.
"""

from .architecture import TEXT_TOKENS, Architecture, Component, Tokenizer, unet_inputs
from .networks import build_networks
from .registry import ARCHITECTURES, find_architecture, resolve_architecture

__all__ = [
    "ARCHITECTURES",
    "TEXT_TOKENS",
    "Architecture",
    "Component",
    "Tokenizer",
    "build_networks",
    "find_architecture",
    "resolve_architecture",
    "unet_inputs",
]
