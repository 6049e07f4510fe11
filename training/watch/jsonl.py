"""The log of a run: one JSON object per report, each on a line of its own, on disk before training goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fastdistill._output import write_files

from .record import Record


class Log:
    """Appends to a file, and continues one that a killed run left.

    Args:
        path: of the file; a last line that was only half written is cut off.

    Attributes:
        records: every record in the file, in its order.

    Raises:
        ValueError: the file holds something else than records. OSError: it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self.records = [_parsed(self.path, number, line) for number, line in enumerate(whole.splitlines(), 1)]
        self._size = len(whole)
        self._waiting = b""

    def begin(self, stage: str, update: int) -> None:
        """Forget what a run that was killed wrote of `stage` past `update`, where it is taken up again.

        The file is replaced whole or not at all. Records of other stages stay.
        """
        kept = [each for each in self.records if each["stage"] != stage or each["update"] <= update]
        if len(kept) < len(self.records):
            content = b"".join(map(_line, kept))
            write_files({self.path: content})
            self.records, self._size, self._waiting = kept, len(content), b""

    def write(self, record: Record) -> None:
        """Append one line. What a full disk does not take is written with the next one that it does.

        Raises:
            OSError: it cannot be written now.
        """
        self._waiting += _line(record)
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            file.truncate(self._size)
            file.seek(self._size)
            rest = memoryview(self._waiting)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        self._size += len(self._waiting)
        self._waiting = b""


def _line(record: Record) -> bytes:
    return (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _parsed(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
        record["stage"], record["update"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: line {number} is no record of a run; needed a log written here") from error
    return record
