"""Files that are there whole or not at all: whether they can be written is known before anything is computed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


class OutputError(OSError):
    """A file or a folder that cannot be written; the message is one line that names it and what is in the way."""


def check_file(path: Path) -> None:
    """That a file can be written at `path`: its folder exists and takes a new file (tried: permission bits lie).

    Raises:
        OutputError: naming what is in the way.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; needed the name of a file")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}")
    _try_folder(path.parent)


def check_folder(folder: Path, *files: Path) -> None:
    """That `folder` takes new files, or can become a folder that does, and that `files` in it are or can become files.

    Creates nothing that stays.

    Raises:
        OutputError: naming what is in the way.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"{existing}: is a file; needed a folder")
    _try_folder(existing)
    for file in files:
        if file.is_dir():
            raise OutputError(f"{file}: is a folder; needed the name of a file")


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write every file under a temporary name beside its own, then rename them all; on failure none is left behind.

    Missing folders are created. Files that exist are replaced.

    Raises:
        OutputError: naming the file.
    """
    staged: list[tuple[str, Path]] = []
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
            staged.append((temporary, path))
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 is for secrets
        while staged:
            os.replace(*staged[-1])
            staged.pop()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        for temporary, _ in staged:
            Path(temporary).unlink(missing_ok=True)


def _try_folder(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{folder}: no file can be written in this folder: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
