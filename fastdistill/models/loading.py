"""From a bundled name or a folder to a diffusers pipeline, with one clear line for each thing that can be wrong."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BUNDLED = Path(__file__).parent / "bundled"


class ModelError(ValueError):
    """A model that is unknown, incomplete or unreadable; the message is one line that names it and what is wrong."""


def bundled_models() -> dict[str, Path]:
    """Folders of the models that ship with the package, by name, sorted."""
    return {index.parent.name: index.parent for index in sorted(BUNDLED.glob("[!.]*/model_index.json"))}


def bundled_networks() -> dict[str, Path]:
    """Folders of single networks of transformers that ship with the package, by name: no pipelines."""
    return {config.parent.name: config.parent for config in sorted(BUNDLED.glob("[!.]*/config.json"))}


def resolve_model(name_or_path: str | Path) -> Path:
    """The pipeline folder of a bundled name, or the given folder, checked to be complete.

    Every component that `model_index.json` lists must be there, its JSON files must parse and its safetensors files
    must be whole. Headers are read, weights are not.

    Args:
        name_or_path: a key of `bundled_models()`, or a folder in the diffusers layout. A bundled name wins over a
            folder of that name in the working directory; write `./name` for the folder.

    Raises:
        ModelError: an unknown name (the known ones are listed), no `model_index.json`, a missing component, a missing
            or unreadable file.
    """
    known = bundled_models()
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    if str(name_or_path) in bundled_networks():
        raise ModelError(f"{name_or_path}: a network alone; needed a pipeline: {', '.join(known)}, or a folder")
    folder = existing_path(name_or_path)
    if folder is None:
        raise ModelError(f"unknown model {str(name_or_path)!r}: no folder, nor one of {', '.join(known) or '(none)'}")
    if not folder.is_dir():
        raise ModelError(f"{folder}: a file; needed a folder that holds model_index.json")
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder}: no model_index.json in this folder, so it is not a diffusers pipeline")
    for component in listed_components(folder):
        _check_component(folder, component)
    return folder


def existing_path(name_or_path: str | Path) -> Path | None:
    """What the path leads to, None if nothing: also for paths that the system refuses to look up."""
    try:
        path = Path(name_or_path).expanduser()
        return path if str(name_or_path).strip() and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, ~nobody
        return None


def load_pipeline(name_or_path: str | Path, dtype: torch.dtype | None = None):
    """The diffusers pipeline of a bundled name or a folder, on the CPU, ready to call.

    Args:
        name_or_path: as for `resolve_model`.
        dtype: of all weights; None is float32.

    Raises:
        ModelError: as `resolve_model`, or diffusers cannot open the folder.
    """
    folder = resolve_model(name_or_path)
    import torch
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    broken = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, SafetensorError)
    try:
        with quiet_libraries():
            options = _diffusers_options(dtype or torch.float32)
            models = _load_models(folder, options, dtype or torch.float32)
            pipeline = DiffusionPipeline.from_pretrained(folder, **options, **models)
    except ModelError:
        raise
    except broken as error:  # what diffusers and transformers raise for damaged folders
        raise ModelError(f"{folder}: diffusers cannot open it: {one_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_models(folder: Path, options: dict, dtype: torch.dtype) -> dict:
    """The models of diffusers and transformers in `folder`; loaded one by one because only so do they tell what lacks.

    A pipeline would give a tensor that is missing in the file random values and go on.
    """
    models = {}
    for component, (library, class_name) in listed_components(folder).items():
        if library not in ("diffusers", "transformers") or not (folder / component / "config.json").is_file():
            continue
        own = options if library == "diffusers" else {"dtype": dtype, "local_files_only": True}
        model_class = getattr(importlib.import_module(library), class_name)
        model, report = model_class.from_pretrained(folder / component, output_loading_info=True, **own)
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"]))
            raise ModelError(f"{folder}: the weight file of {component!r} lacks {missing}")
        models[component] = model.eval()
    return models


def _diffusers_options(dtype: torch.dtype) -> dict:
    """Keyword arguments for `from_pretrained` of diffusers, without warnings in any version."""
    import diffusers
    from packaging.version import Version

    # Renamed in 0.40, which warns about the old name; older versions ignore the new one.
    name = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
    # low_cpu_mem_usage needs accelerate, which is not a dependency.
    return {name: dtype, "low_cpu_mem_usage": False, "local_files_only": True}


def listed_components(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of each component that is there, by name."""
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ModelError(f"{folder / 'model_index.json'}: no diffusers pipeline; needed an object with _class_name")
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    return {name: tuple(entry) for name, entry in entries.items() if entry[0] is not None}


def _check_component(folder: Path, component: str) -> None:
    part = folder / component
    if not part.is_dir():
        raise ModelError(f"{folder}: component {component!r} is missing: model_index.json lists it, no folder holds it")
    files = list(part.iterdir())
    if not any(file.suffix == ".json" for file in files):
        raise ModelError(f"{part}: component {component!r} has no configuration file")
    for file in files:
        if file.suffix == ".json":
            read_json(file)
        elif file.suffix == ".safetensors":
            _check_safetensors(file)
    weights = [file for file in files if file.suffix in (".safetensors", ".bin")]
    if (part / "config.json").is_file() and not weights:  # only models keep their settings in config.json
        raise ModelError(f"{part}: component {component!r} has no weight file (*.safetensors)")


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):  # compares the header with the length of the file
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: unreadable or truncated weight file: {one_line(error)}") from error


def read_json(file: Path):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        raise ModelError(f"{file}: unreadable JSON: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Progress bars and remarks of diffusers and transformers off, and back as they were."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()
