"""Checkpoints that are whole or not there: safetensors and JSON, written aside, synced, and renamed into place.

    <folder>/step-00000100/state.json            everything that is no tensor, and each file's size and SHA-256
                           student.safetensors   one file per part of the state
                           student/shard-…       in its place, where the part is sharded, one per process

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

from fastdistill.optim.shards import as_sharded, is_sharded

from . import sharded_files
from .files import make_folder, sha256, sync
from .world import World

FORMAT = 2
_NAME = re.compile(r"step-(\d{8,})")
_STATE = "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or that is there and cannot be used. The message names the file."""


def save(
    folder: str | Path,
    step: int,
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    best: int | None = None,
    world: World | None = None,
) -> Path:
    """Write `state` as the checkpoint of `step`, then remove all but the newest `keep` and the `best`.

    Args:
        folder: of the run's checkpoints; made if it is not there.
        step: names the checkpoint. One of this number that is whole is kept: it is of the same step of the same run.
        state: parts by name; each a tree of dicts (keys str or int), lists, tuples, tensors and JSON scalars.
        world: the processes of the run, which all call this, on a file system that they share. The first one writes;
            of sharded tensors each one its part.

    Raises:
        CheckpointError: it cannot be written (a full disk, no permission), in all processes. What was saved before is
            untouched.
        TypeError: a part holds something else, named by its place.
    """
    folder, world = Path(folder), world or World()
    target = folder / f"step-{step:08d}"
    scratch = folder / f".{target.name}.partial"
    parts: dict[str, Any] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tree in state.items():
        parts[name] = _pack(tree, name, tensors.setdefault(name, {}))
    shards = {name: {k: t for k, t in found.items() if is_sharded(t)} for name, found in tensors.items()}

    def begin() -> bool:
        make_folder(folder)
        _clear(folder)
        if _is_whole(target):
            return False
        shutil.rmtree(target, ignore_errors=True)
        scratch.mkdir()
        return True

    def finish(files: Mapping[str, Any]) -> None:
        whole = {name: {k: t for k, t in found.items() if not is_sharded(t)} for name, found in tensors.items()}
        _write(scratch, step, parts, whole, files)
        os.replace(scratch, target)
        sync(folder)

    try:
        if world.first(begin):
            written = [file for name in shards if shards[name] for file in _write_shards(scratch, name, shards, world)]
            known = world.each(lambda: {str(file.relative_to(scratch)): _facts(file) for file in written})
            files = {name: facts for of_process in known for name, facts in of_process.items()}
            world.first(lambda: finish(files))
    except OSError as error:
        if world.is_first:
            _clear(folder)
        world.wait()  # all raise, when nothing is left of it
        problem = f"{target}: cannot be written ({error}); what was saved before is still there"
        raise CheckpointError(problem) from error
    if world.is_first:
        kept = {step, best, *sorted(_steps(folder))[-max(keep, 1) :]}
        for number, path in _steps(folder).items():
            if number not in kept:
                shutil.rmtree(path, ignore_errors=True)
    return target


def load(path: str | Path, *, like: Mapping[str, Any] | None = None, world: World | None = None) -> dict[str, Any]:
    """The state of one checkpoint, as `save` was given it, tensors on the CPU.

    Args:
        like: a state of the same form, as far as it goes: where it has a sharded tensor, so has the result; elsewhere
            tensors are whole, whichever they were when they were saved.
        world: the processes of the run, however many have saved it; all call this.

    Raises:
        CheckpointError: naming the file that is missing, truncated or changed, or of a format not known here; in all
            processes.
    """
    path, world = Path(path), world or World()
    parts, files = _verified(path, world)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in files:
        if "/" not in name:
            tensors[name.removesuffix(".safetensors")] = load_file(path / name)
    state, sharded = {}, {}
    for name, tree in parts.items():
        sharded[name] = {}
        state[name] = _unpack(tree, (like or {}).get(name), tensors.get(name, {}), sharded[name])
    try:
        for name, targets in sharded.items():
            if targets:
                sharded_files.read(path / name, targets, world)
    except OSError as error:
        raise CheckpointError(f"{path / name}: cannot be read ({error})") from error
    return state


def there_are(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, damaged ones included."""
    return bool(_steps(folder))


def load_newest(
    folder: str | Path, *, like: Mapping[str, Any] | None = None, world: World | None = None
) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint that is whole; None where there is none at all.

    One that is damaged is named in a warning, and the one before it is tried. Arguments are those of `load`.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    found = _steps(Path(folder))
    problem = None
    for step in sorted(found, reverse=True):
        try:
            return step, load(found[step], like=like, world=world)
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
        _verified(path, World())
    except CheckpointError:
        return False
    return True


def _verified(path: Path, world: World) -> tuple[dict[str, Any], list[str]]:
    """The parts as JSON, and the names of the files of their tensors, each of which is as it was written.

    The processes share the files to look at, and all raise what one of them found.
    """
    problem = None
    parts: dict[str, Any] = {}
    files: dict[str, Any] = {}
    try:
        parts, files = _record(path)
        for name in sorted(files)[world.rank :: world.size]:
            _verify(path / name, files[name]["bytes"], files[name]["sha256"])
    except CheckpointError as error:
        problem = str(error)
    for found in world.gather(problem):
        if found is not None:
            raise CheckpointError(found)
    return parts, list(files)


def _record(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
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
    return parts, files


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


def _write_shards(folder: Path, part: str, shards: Mapping[str, Mapping[str, Tensor]], world: World) -> list[Path]:
    """This process's files of a part, on the disk."""
    files = sharded_files.write(folder / part, shards[part], world)

    def on_disk() -> None:
        for file in (*files, folder / part):
            sync(file)

    world.each(on_disk)
    return files


def _write(
    folder: Path,
    step: int,
    parts: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    files: Mapping[str, Any],
) -> None:
    """Everything but the shards, whose files are known."""
    files = dict(files)
    for name, found in tensors.items():
        if found:
            file = folder / f"{name}.safetensors"
            # A copy: parameters may share memory, and safetensors writes dense ones only.
            copies = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in found.items()}
            try:
                save_file(copies, file)
            except SafetensorError as error:  # a full disk
                raise OSError(f"{file.name}: {error}") from error
            sync(file)
            files[file.name] = _facts(file)
    record = {"format": FORMAT, "step": step, "files": files, "parts": parts}
    record["digest"] = _digest_of(record)
    (folder / _STATE).write_text(json.dumps(record), encoding="utf-8")
    sync(folder / _STATE)
    sync(folder)


def _facts(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a tree whose tensors are put aside under their place."""
    if isinstance(value, Tensor):
        tensors[place] = value
        if is_sharded(value):
            return {"shards": [place, list(value.shape), str(value.dtype).removeprefix("torch.")]}
        return {"tensor": place}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(each, f"{place}.{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, (list, tuple)):
        packed = [_pack(each, f"{place}.{index}", tensors) for index, each in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": packed}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"{place}: a {type(value).__name__} cannot be kept in a checkpoint")


def _unpack(packed: Any, like: Any, tensors: Mapping[str, Tensor], sharded: dict[str, Tensor]) -> Any:
    """The tree of a part; what was saved in shards is put aside under its place, still to be read."""
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return as_sharded(tensors[content], like) if isinstance(like, Tensor) else tensors[content]
    if kind == "shards":
        place, shape, dtype = content
        known = like if isinstance(like, Tensor) and is_sharded(like) else None
        sharded[place] = sharded_files.empty(known, shape, getattr(torch, dtype))
        return sharded[place]
    if kind == "dict":
        inner = like if isinstance(like, Mapping) else {}
        return {key: _unpack(each, inner.get(key), tensors, sharded) for key, each in content}
    if kind in ("list", "tuple"):
        values = [_unpack(each, None, tensors, sharded) for each in content]
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
