"""Checkpoints that are whole or not there: safetensors and JSON, written aside, synced, and renamed into place.

    <folder>/step-00000100/state.json            everything that is no tensor, and each file's size and SHA-256
                           student.safetensors   one file per part of the state

Nothing is pickled, so that opening a checkpoint runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import make_folder, sha256, sync

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_STATE = "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or that is there and cannot be used. The message names the file."""


def save(folder: str | Path, step: int, state: Mapping[str, Any], *, keep: int = 2, best: int | None = None) -> Path:
    """Write `state` as the checkpoint of `step`, then remove all but the newest `keep` and the `best`.

    Args:
        folder: of the run's checkpoints; made if it is not there.
        step: names the checkpoint. One of this number that is whole is kept: it is of the same step of the same run.
        state: parts by name; each a tree of dicts (keys str or int), lists, tuples, tensors and JSON scalars.

    Raises:
        CheckpointError: it cannot be written (a full disk, no permission). What was saved before is untouched.
        TypeError: a part holds something else, named by its place.
    """
    folder = Path(folder)
    target = folder / f"step-{step:08d}"
    scratch = folder / f".{target.name}.partial"
    try:
        make_folder(folder)
        _clear(folder)
        if not _is_whole(target):
            shutil.rmtree(target, ignore_errors=True)
            scratch.mkdir()
            _write(scratch, step, state)
            os.replace(scratch, target)
            sync(folder)
    except TypeError:
        _clear(folder)
        raise
    except (OSError, SafetensorError) as error:
        _clear(folder)
        raise CheckpointError(f"{target}: cannot be written ({error}); what was saved before is still there") from error
    kept = {step, best, *sorted(_steps(folder))[-max(keep, 1) :]}
    for number, path in _steps(folder).items():
        if number not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return target


def load(path: str | Path) -> dict[str, Any]:
    """The state of one checkpoint, as `save` was given it, tensors on the CPU.

    Raises:
        CheckpointError: naming the file that is missing, truncated or changed, or of a format not known here.
    """
    path = Path(path)
    parts, files = _verified(path)
    tensors = {file.stem: load_file(file) for file in files}
    return {name: _unpack(tree, tensors.get(name, {})) for name, tree in parts.items()}


def there_are(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, damaged ones included."""
    return bool(_steps(folder))


def load_newest(folder: str | Path) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint that is whole; None where there is none at all.

    One that is damaged is named in a warning, and the one before it is tried.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    found = _steps(Path(folder))
    problem = None
    for step in sorted(found, reverse=True):
        try:
            return step, load(found[step])
        except CheckpointError as error:
            problem = error
            warnings.warn(f"checkpoint refused: {error}", stacklevel=2)
    if problem is not None:
        raise CheckpointError(f"{folder}: none of its {len(found)} checkpoints can be used; the oldest: {problem}")
    return None


def _clear(folder: Path) -> None:
    """Remove what a killed run left half done."""
    for path in folder.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    try:
        _verified(path)
    except CheckpointError:
        return False
    return True


def _verified(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """The parts as JSON, and the files of their tensors; a CheckpointError names what is not as it was written."""
    state = path / _STATE
    try:
        record = json.loads(state.read_text(encoding="utf-8"))
        files, parts, known = record["files"], record["parts"], record["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{state}: cannot be read ({error})") from error
    if not known:
        raise CheckpointError(f"{state}: format {record['format']!r}; this version reads {FORMAT}")
    if _digest_of(record) != record.get("digest"):
        raise CheckpointError(f"{state}: it was changed after it was written")
    if (match := _NAME.fullmatch(path.name)) and int(match[1]) != record["step"]:
        raise CheckpointError(f"{state}: it is of step {record['step']}, under another's name")
    for name, facts in files.items():
        _verify(path / name, facts["bytes"], facts["sha256"])
    return parts, [path / name for name in files]


def _verify(file: Path, size: int, digest: str) -> None:
    try:
        if (found := file.stat().st_size) != size:
            raise CheckpointError(f"{file}: {found} bytes, {size} were written")
        if sha256(file) != digest:
            raise CheckpointError(f"{file}: its content was changed after it was written")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: is missing") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error


def _steps(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    return {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}


def _write(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    files, parts = {}, {}
    for name, tree in state.items():
        tensors: dict[str, Tensor] = {}
        parts[name] = _pack(tree, name, tensors)
        if tensors:
            file = folder / f"{name}.safetensors"
            save_file(tensors, file)
            sync(file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    record = {"format": FORMAT, "step": step, "files": files, "parts": parts}
    record["digest"] = _digest_of(record)
    (folder / _STATE).write_text(json.dumps(record), encoding="utf-8")
    sync(folder / _STATE)
    sync(folder)


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a tree whose tensors are put aside under their place."""
    if isinstance(value, Tensor):
        # A copy: parameters may share memory, and safetensors writes dense ones only.
        tensors[place] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": place}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(each, f"{place}.{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, (list, tuple)):
        packed = [_pack(each, f"{place}.{index}", tensors) for index, each in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": packed}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"{place}: a {type(value).__name__} cannot be kept in a checkpoint")


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(each, tensors) for key, each in content}
    if kind in ("list", "tuple"):
        values = [_unpack(each, tensors) for each in content]
        return tuple(values) if kind == "tuple" else values
    return content


def _digest_of(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def random_state() -> dict[str, Any]:
    """Of torch's own generators, which dropout draws from."""
    return {"cpu": torch.get_rng_state(), "cuda": list(torch.cuda.get_rng_state_all())}


def restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
