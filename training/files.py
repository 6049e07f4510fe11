"""Files that survive a crash: whole on the disk, or not there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """What was written is on the disk when this returns, be it a file or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """Write or replace a file, whole or not at all."""
    partial(path).write_text(text, encoding="utf-8")
    publish(path)
