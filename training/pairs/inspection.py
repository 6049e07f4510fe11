"""What is in a set of pairs, without reading its numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from safetensors import SafetensorError, safe_open

from .pair_set import PairSet, read_set
from .shards import is_claimed, read_record, shard_file

PROMPTS = 5  # shown


@dataclass(frozen=True)
class Shard:
    """One file of a set.

    state: "whole", "missing", "being made" (by a process that runs), "cut off" (not as long as was written), or
        "without record" (of its length and SHA-256).
    """

    file: str
    pairs: int
    state: str
    bytes: int


@dataclass(frozen=True)
class Contents:
    """What `inspect` finds.

    Attributes:
        pair_set: what the set is to be.
        shards: its files.
        prompts: of the first pairs that are there.
    """

    pair_set: PairSet
    shards: list[Shard]
    prompts: list[str]

    @property
    def pairs(self) -> int:
        """How many are there, in whole shards."""
        return sum(shard.pairs for shard in self.shards if shard.state == "whole")

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "set": asdict(self.pair_set),
            "pairs": self.pairs,
            "bytes": self.bytes,
            "prompts": self.prompts,
            "shards": [asdict(shard) for shard in self.shards],
        }


def inspect(folder: str | Path) -> Contents:
    """Look at the set in a folder.

    Raises:
        PairSetError: there is none.
    """
    folder = Path(folder)
    pair_set = read_set(folder)
    shards = [_shard(folder, pair_set, number) for number in range(pair_set.shards)]
    first = next((shard for shard in shards if shard.state == "whole"), None)
    return Contents(pair_set, shards, [] if first is None else _prompts(folder / first.file))


def render(contents: Contents) -> Group:
    """As two tables; neighbouring shards of one state are one row."""
    pair_set = contents.pair_set
    facts = Table("fact", "value", title=f"{contents.pairs} of {pair_set.count} pairs, {_size(contents.bytes)}")
    for name, value in asdict(pair_set).items():
        facts.add_row(name.replace("_", " "), str(value)[:16] if name.endswith("sha256") else str(value))
    facts.add_row("first prompts", "\n".join(contents.prompts) or "-")
    shards = Table("shards", "state", "pairs", "size")
    for state, group in groupby(contents.shards, lambda shard: shard.state):
        run = list(group)
        names = run[0].file if len(run) == 1 else f"{run[0].file} … {run[-1].file}"
        shards.add_row(names, state, str(sum(s.pairs for s in run)), _size(sum(s.bytes for s in run)))
    return Group(facts, shards)


def _shard(folder: Path, pair_set: PairSet, number: int) -> Shard:
    file, pairs = shard_file(folder, number), len(pair_set.span(number))
    if not file.is_file():
        return Shard(file.name, pairs, "being made" if is_claimed(folder, number) else "missing", 0)
    size = file.stat().st_size
    try:
        state = "whole" if read_record(folder, number).bytes == size else "cut off"
    except (OSError, ValueError):
        state = "without record"
    return Shard(file.name, pairs, state, size)


def _prompts(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return json.loads(opened.metadata()["prompts"])[:PROMPTS]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return []


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
