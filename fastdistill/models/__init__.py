"""Pipelines by name or path, and the digits models that ship with the package.

Importing this is light: torch and diffusers are imported when a pipeline is loaded.
"""

from .loading import ModelError, bundled_models, bundled_networks, load_pipeline, resolve_model

__all__ = ["ModelError", "bundled_models", "bundled_networks", "load_pipeline", "resolve_model"]
