"""A digits pipeline as a folder on disk: float16 safetensors that plain diffusers opens in float32."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..loading import quiet_libraries


def assemble(vae, tokenizer, text_encoder, unet, scheduler):
    """The components as a `StableDiffusionPipeline` without safety checker, its progress bar off."""
    with quiet_libraries():  # the import reports what optional packages it does without
        from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_folder(pipeline, folder: str | Path, card: str) -> Path:
    """Write `pipeline` and its model card (`README.md`) to `folder`, replacing it only when everything is written.

    Weights become float16. The text encoder's config says float32 all the same: transformers keeps the saved dtype,
    diffusers does not, and a pipeline in two dtypes fails at its first call. The tensors keep the names that
    transformers 4 and 5 both read.

    Args:
        pipeline: a `StableDiffusionPipeline` with the tokenizer of `build_tokenizer`, left as it is.
        folder: an existing pipeline folder there is replaced; any other non-empty folder raises.
        card: Markdown of the model card.

    Raises:
        FileExistsError: `folder` is a file or holds something that is not a pipeline.
        ValueError: the tokenizer has another vocabulary.
    """
    folder = check_target(folder)
    with written_whole(folder) as fresh:
        with quiet_libraries():
            _half(pipeline).save_pretrained(fresh, safe_serialization=True)
        _portable_text_encoder(fresh / "text_encoder")
        _portable_tokenizer(pipeline.tokenizer, fresh / "tokenizer")
        _without_paths(fresh)
        (fresh / "README.md").write_text(card, encoding="utf-8")
    return folder


def check_target(folder: str | Path, mark: str = "model_index.json", what: str = "pipeline") -> Path:
    """The folder, if it may be written to: absent, empty or of its kind; a long training asks first.

    Args:
        mark: the file by which a folder is known to be `what`, which may be replaced.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: a file; needed a folder to write a {what} to")
    if folder.exists() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise FileExistsError(f"{folder}: not empty and not a {what} folder; it is left as it is")
    return folder


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `folder` when everything in it is written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / folder.name
        yield fresh
        for path in fresh.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            os.replace(folder, Path(scratch) / "replaced")
        os.replace(fresh, folder)


def _half(pipeline):
    parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "unet")}
    halved = {name: copy.deepcopy(part).to(torch.float16) for name, part in parts.items()}
    return assemble(tokenizer=pipeline.tokenizer, scheduler=pipeline.scheduler, **halved)


def _portable_text_encoder(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    prefix = "text_model."  # transformers 5 drops it when saving, accepts it when loading; 4 needs it
    named = {name if name.startswith(prefix) else prefix + name: tensor for name, tensor in weights.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    config["torch_dtype"] = "float32"  # the name that both versions know
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _portable_tokenizer(tokenizer, folder: Path) -> None:
    from ..clip_tokenizer import write_vocabulary
    from .text import caption_merges

    write_vocabulary(folder, caption_merges())
    if json.loads((folder / "vocab.json").read_text(encoding="utf-8")) != tokenizer.get_vocab():
        raise ValueError(f"pipeline.tokenizer: another vocabulary ({len(tokenizer)} tokens) than the digits'")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in ("is_local", "local_files_only")}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(
        json.dumps({name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}, indent=2) + "\n"
    )


def _without_paths(folder: Path) -> None:
    """Forget where the components were loaded from: saved configs carry it, and it means nothing to others."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
