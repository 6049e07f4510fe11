"""Pipelines by name or path, published architectures with random weights, and the digits models of the package.

Importing this is light: torch and diffusers are imported when a pipeline is loaded or built.
"""

from .architectures import ARCHITECTURES, Architecture, resolve_architecture
from .builders import build
from .loading import ModelError, bundled_models, bundled_networks, load_pipeline, resolve_model

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ModelError",
    "build",
    "bundled_models",
    "bundled_networks",
    "load_pipeline",
    "resolve_architecture",
    "resolve_model",
]
