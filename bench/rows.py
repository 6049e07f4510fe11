"""One row of a result: what was measured, how fast, how exact, at what cost. And its line in the JSON file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .accuracy import Accuracy
from .roofline import Limit
from .timing import Speed
from .usage import Usage

RESULTS = "results.jsonl"
_DIGITS = 6  # significant ones of every figure in the file


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

    @property
    def group(self) -> tuple[str, ...]:
        """What rows have in common that differ in their shape alone."""
        return (self.op, self.mode, self.dtype, self.layout, self.cache, self.provider)


@dataclass(frozen=True)
class Row:
    """A measured row has both a speed and an accuracy: there is no speed without its error. A provider that could not
    be measured has neither, and `missing` says why; `raised` if that is a defect and not a matter of what is here.

    `limit`: what the call must do at least, where the op knows it. `usage`: memory and launches. `note`: what else a
    reader must know.
    """

    key: Key
    baseline: str
    speed: Speed | None = None
    accuracy: Accuracy | None = None
    missing: str = ""
    raised: bool = False
    limit: Limit | None = None
    usage: Usage = field(default_factory=Usage)
    note: str = ""

    def __post_init__(self) -> None:
        measured = self.speed is not None and self.accuracy is not None
        absent = self.speed is None and self.accuracy is None
        if not (absent if self.missing else measured):
            raise ValueError(f"a row holds a speed and an accuracy, or the reason why it does not: {self}")

    @property
    def status(self) -> str:
        """ "ok", "failed" (the error exceeds what is allowed), "missing" or "raised"."""
        if self.accuracy is None:
            return "raised" if self.raised else "missing"
        return "ok" if self.accuracy.ok else "failed"

    @property
    def percent(self) -> float | None:
        """Of the roofline reached."""
        return self.limit.percent(self.speed.ours_us) if self.limit and self.speed else None


def write_jsonl(rows: Iterable[Row], environment: Mapping[str, object], directory: Path) -> Path:
    """Merge into `directory`/results.jsonl: a row replaces that of the same key, others stay; complete or not at all.

    A line holds an environment or a row; a row names its environment by id.
    """
    path = directory / RESULTS
    merged = {row.key: (row, dict(known)) for row, known in (read_jsonl(path) if path.exists() else ())}
    merged.update({row.key: (row, dict(environment)) for row in rows})
    lines, known_ids = [], set()
    for row, where in merged.values():
        text = json.dumps(where, sort_keys=True)
        identity = hashlib.sha256(text.encode()).hexdigest()[:12]
        if identity not in known_ids:
            known_ids.add(identity)
            lines.append(json.dumps({"id": identity, "environment": where}))
        record = {name: value for name, value in dataclasses.asdict(row).items() if value not in (None, "", False)}
        lines.append(json.dumps({**_short(record), "status": row.status, "environment": identity}))
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in lines))
    os.replace(partial, path)
    return path


def read_jsonl(path: Path) -> list[tuple[Row, dict[str, object]]]:
    """The rows of a results file and the environment each was measured in.

    Raises ValueError where the file is something else.
    """
    environments: dict[str, dict[str, object]] = {}
    result = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            if "id" in record:
                environments[record["id"]] = record["environment"]
            else:
                result.append((_from_json(record), environments[record["environment"]]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no row of a benchmark: {error!r}") from error
    return result


def _from_json(record: dict) -> Row:
    return Row(
        Key(**record["key"]),
        record["baseline"],
        Speed(**record["speed"]) if "speed" in record else None,
        Accuracy(**record["accuracy"]) if "accuracy" in record else None,
        record.get("missing", ""),
        record.get("raised", False),
        Limit(**record["limit"]) if "limit" in record else None,
        Usage(**record.get("usage", {})),
        record.get("note", ""),
    )


def _short(value: object) -> object:
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
