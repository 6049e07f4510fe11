"""One row of a result: what was measured, how fast, how exact. And its line in the JSON file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .accuracy import Accuracy
from .timing import Speed

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Key:
    """What a row is about; two runs are compared row by row by this."""

    op: str
    case: str
    mode: str
    dtype: str
    layout: str
    cache: str
    device: str
    provider: str


@dataclass(frozen=True)
class Row:
    """A measured row has both a speed and an accuracy: there is no speed without its error. A provider that could not
    be measured has neither, and `missing` says why."""

    key: Key
    baseline: str
    speed: Speed | None = None
    accuracy: Accuracy | None = None
    missing: str = ""

    def __post_init__(self) -> None:
        measured = self.speed is not None and self.accuracy is not None
        absent = self.speed is None and self.accuracy is None
        if not (absent if self.missing else measured):
            raise ValueError(f"a row holds a speed and an accuracy, or the reason why it does not: {self}")

    @property
    def status(self) -> str:
        """ "ok", "failed" (the error exceeds what is allowed) or "missing"."""
        if self.accuracy is None:
            return "missing"
        return "ok" if self.accuracy.ok else "failed"


def write_jsonl(rows: Iterable[Row], environment: Mapping[str, object], directory: Path) -> Path:
    """Write `directory`/results.jsonl, one row with its environment per line; complete or not at all."""
    path = directory / RESULTS
    partial = path.with_suffix(".partial")
    lines = (
        json.dumps({**dataclasses.asdict(row), "status": row.status, "environment": dict(environment)}) for row in rows
    )
    partial.write_text("".join(f"{line}\n" for line in lines))
    os.replace(partial, path)
    return path


def read_jsonl(path: Path) -> list[tuple[Row, dict[str, object]]]:
    """The rows of a results file and the environment each was measured in."""
    return [_from_json(json.loads(line)) for line in path.read_text().splitlines()]


def _from_json(record: dict) -> tuple[Row, dict[str, object]]:
    row = Row(
        Key(**record["key"]),
        record["baseline"],
        record["speed"] and Speed(**record["speed"]),
        record["accuracy"] and Accuracy(**record["accuracy"]),
        record["missing"],
    )
    return row, record["environment"]
