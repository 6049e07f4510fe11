"""The files of a set: one shard of pairs each, whole or not there, made by one process at a time.

    pairs-00003.safetensors   pair, prompt (n,) int64 · latent, and if stored noise, states, pooled, time_ids
    pairs-00003.json          its bytes and SHA-256

The record is written first and the shard gets its name last: a shard that is there is finished.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..files import partial, publish, sha256, write_text


@dataclass(frozen=True)
class Record:
    """Of one shard's file, to tell whether it is still as it was written."""

    bytes: int
    sha256: str


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"pairs-{shard:05d}.safetensors"


def record_file(folder: Path, shard: int) -> Path:
    return folder / f"pairs-{shard:05d}.json"


def write_shard(folder: Path, shard: int, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a shard and its record; on a crash at any moment there is the whole shard or none.

    Raises:
        OSError: it cannot be written: a full disk, no permission.
    """
    file = shard_file(folder, shard)
    written = partial(file)
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, written, metadata=metadata)
        written.chmod(0o644)  # safetensors may leave 0600
        record = Record(written.stat().st_size, sha256(written))
        write_text(record_file(folder, shard), json.dumps(asdict(record)) + "\n")
        publish(file)
    except (OSError, SafetensorError) as error:
        for left in (written, partial(record_file(folder, shard))):
            left.unlink(missing_ok=True)
        raise OSError(f"{file}: cannot be written ({error}); the shards before it are there") from error


def read_record(folder: Path, shard: int) -> Record:
    """Raises OSError or ValueError where there is none that can be read."""
    content = json.loads(record_file(folder, shard).read_text(encoding="utf-8"))
    try:
        return Record(int(content["bytes"]), str(content["sha256"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"no size and digest in it ({error})") from error


@contextmanager
def claimed(folder: Path, shard: int) -> Iterator[bool]:
    """Whether this process may make the shard now: it is not there, and no other process is making it.

    The claim is a lock that the kernel drops with its process, however that ends. Its file is removed only once the
    shard is there, so that nobody who still holds the old file can believe to be alone.
    """
    lock = folder / f".pairs-{shard:05d}.lock"
    if shard_file(folder, shard).exists():
        lock.unlink(missing_ok=True)
        yield False
        return
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not shard_file(folder, shard).exists()
        if shard_file(folder, shard).exists():
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def is_claimed(folder: Path, shard: int) -> bool:
    """Whether a process is making the shard at the moment."""
    try:
        descriptor = os.open(folder / f".pairs-{shard:05d}.lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
