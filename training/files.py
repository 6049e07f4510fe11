"""Files that survive a crash: whole on the disk, or not there."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """What was written is on the disk when this returns, be it a file or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """With its parents, where they are not there; their names are on the disk too when this returns."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync(each.parent)


def sha256(file: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def partial(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`: beside it, hidden."""
    return path.with_name(f".{path.name}.partial")


def publish(path: Path) -> None:
    """Give the file that was written at `partial(path)` its name, once its bytes are on the disk."""
    sync(partial(path))
    os.replace(partial(path), path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write or replace a file, whole or not at all; an OSError names it."""
    try:
        partial(path).write_text(text, encoding="utf-8")
        publish(path)
    except OSError as error:
        partial(path).unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error})") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While this runs no other process does so with the same folder, which is made if it is not there.

    By a lock on a file in it, which the kernel drops with its process, however that ends; where the file system has no
    locks nothing is kept out.

    Raises:
        BlockingIOError: another process does, named by its id. OSError: nothing can be written there.
    """
    make_folder(folder)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except BlockingIOError as error:
        owner = os.read(descriptor, 20).decode()
        os.close(descriptor)
        raise BlockingIOError(f"{folder}: another process ({owner}) is at work in it") from error
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)
