"""The architecture of a pipeline folder, from its JSON files alone."""

from __future__ import annotations

from pathlib import Path

from ..loading import ModelError, listed_components, read_json
from .architecture import Architecture, Component


def read_architecture(folder: Path) -> Architecture:
    """What `model_index.json` and the components' configurations say; weights are neither needed nor read.

    Raises:
        ModelError: no pipeline like Stable Diffusion 1, 2 or XL; what is missing, unreadable or unknown is named.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: a file; needed a folder that holds model_index.json")
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder}: no model_index.json in this folder, so it is not a diffusers pipeline")
    index = read_json(folder / "model_index.json")
    classes = listed_components(folder)
    networks = {
        name: _read(folder, name, classes[name], "config.json")
        for name in ("unet", "vae", "text_encoder", "text_encoder_2")
        if name in classes
    }
    for name in ("unet", "vae", "text_encoder", "scheduler"):
        if name not in classes:
            raise ModelError(f"{folder}: model_index.json lists no {name}; needed a pipeline like Stable Diffusion")
    for name, class_name in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        if networks[name].class_name != class_name:
            raise ModelError(f"{folder}: {name} is a {networks[name].class_name}; needed {class_name}")
    return Architecture(
        name=folder.resolve().name,
        pipeline=index["_class_name"],
        networks=networks,
        scheduler=_read(folder, "scheduler", classes["scheduler"], "scheduler_config.json"),
        tokenizers={},
        options={},
    )


def _read(folder: Path, name: str, library_and_class: tuple[str, str], file_name: str) -> Component:
    library, class_name = library_and_class
    if library not in ("diffusers", "transformers"):
        raise ModelError(f"{folder}: {name} is a {class_name} of {library}; needed one of diffusers or transformers")
    file = folder / name / file_name
    if not file.is_file():
        raise ModelError(f"{file}: missing; model_index.json lists {name}")
    content = read_json(file)
    if not isinstance(content, dict):
        raise ModelError(f"{file}: needed a JSON object with the settings of a {class_name}")
    return Component(library, class_name, {key: value for key, value in content.items() if not key.startswith("_")})
