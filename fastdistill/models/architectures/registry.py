"""From a name or a folder to an architecture."""

from __future__ import annotations

import difflib
from pathlib import Path

from ..loading import ModelError, bundled_models, existing_path
from .architecture import Architecture
from .folder import read_architecture
from .published import SD15, SD21, SD_TURBO, SDXL, SDXL_TURBO
from .tiny import tiny

_FAMILIES = ((SD15, "sd15"), (SD21, "sd21"), (SDXL, "sdxl"), (SD_TURBO, "sd21"), (SDXL_TURBO, "sdxl"))

ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for each in (
        *(architecture for architecture, _ in _FAMILIES),
        *(tiny(architecture, family) for architecture, family in _FAMILIES),
    )
}
"""By name; `fastdistill models` lists them."""


def find_architecture(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        ModelError: an unknown name; the known ones are listed, the most similar first.
    """
    if name not in ARCHITECTURES:
        raise ModelError(f"unknown architecture {name!r}; known: {', '.join(_nearest_first(name))}")
    return ARCHITECTURES[name]


def resolve_architecture(name_or_path: str | Path) -> Architecture:
    """The architecture of a name, of a bundled model, or of a folder in the diffusers layout.

    Of a folder its JSON files are read, never weights, so that it may hold none.

    Args:
        name_or_path: a key of `ARCHITECTURES` or of `bundled_models()`, or a folder; a name wins over a folder of that
            name in the working directory.

    Raises:
        ModelError: an unknown name, or a folder that is no pipeline like Stable Diffusion.
    """
    name = str(name_or_path)
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    folder = bundled_models().get(name) or existing_path(name_or_path)
    if folder is None:
        known = ", ".join(_nearest_first(name))
        raise ModelError(f"unknown architecture {name!r}: no folder, no bundled model, nor one of {known}")
    return read_architecture(folder)


def _nearest_first(name: str) -> list[str]:
    similar = difflib.get_close_matches(name.lower(), ARCHITECTURES, n=len(ARCHITECTURES), cutoff=0.5)
    return [*similar, *(known for known in ARCHITECTURES if known not in similar)]
