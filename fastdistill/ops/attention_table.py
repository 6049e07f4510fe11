"""The choice table of attention: which backend is fastest for which shapes, per device.

A table is a JSON file, read once per process:

    {"device": "nvidia-h200", "source": "who says so",
     "rules": [{"D": [64, 64], "N": [2049, null], "dtype": ["bfloat16"], "direction": ["forward"],
                "backends": ["sdpa:cudnn", "sdpa"], "reason": "why"}, …]}

The first rule that holds decides, and of its backends the first that can serve. Keys that a rule leaves out hold for
every call. `D`, `N`, `M` and `heads` (B * H) are ranges, both ends included, null for none; `dtype` and `direction` are
lists; direction is "forward" where no gradient is needed and "full" where one is.

The first of these files that exists is used: the one that FASTDISTILL_ATTENTION_TABLE names (it must exist, and serves
every device), the user's own for the device (`fastdistill tune attention` writes it), the package's for the device, the
package's default.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fastdistill.ops import _dispatch

VARIABLE = "FASTDISTILL_ATTENTION_TABLE"
DTYPES = ("float32", "float16", "bfloat16")
DIRECTIONS = ("forward", "full")
RANGES = ("D", "N", "M", "heads")
UNLIMITED = 1 << 62
BACKENDS = ("triton", "sdpa", "sdpa:cudnn", "sdpa:flash", "sdpa:efficient", "sdpa:math", "reference")

_PACKAGED = Path(__file__).with_name("attention_tables")


class TableError(ValueError):
    """A file that is no choice table; the message names the file and the entry."""


class Site(NamedTuple):
    """What a call looks like to the table. heads: B * H."""

    D: int
    N: int
    M: int
    heads: int
    dtype: str
    direction: str


@dataclass(frozen=True)
class Rule:
    """ranges: (lowest, highest) of D, N, M and heads."""

    backends: tuple[str, ...]
    reason: str
    ranges: tuple[tuple[int, int], ...] = ((1, UNLIMITED),) * len(RANGES)
    dtypes: tuple[str, ...] = DTYPES
    directions: tuple[str, ...] = DIRECTIONS

    def holds(self, site: Site) -> bool:
        return _holds(self.ranges, self.dtypes, self.directions, site)


def _holds(ranges, dtypes, directions, site: Site) -> bool:
    if site.dtype not in dtypes or site.direction not in directions:
        return False
    return all(low <= value <= high for (low, high), value in zip(ranges, site[: len(RANGES)]))


@dataclass(frozen=True)
class Table:
    """path: where it was read; device: whom it is for; source: how its rules came about."""

    path: str
    device: str
    source: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Choice:
    """The backends in the order that a table prefers, and its rule; none where no rule holds."""

    table: Table
    number: int = 0  # of the rule, from 1
    rule: Rule | None = None

    @property
    def backends(self) -> tuple[str, ...]:
        return () if self.rule is None else self.rule.backends

    def __str__(self) -> str:
        where = f"{self.table.path} ({self.table.source})"
        if self.rule is None:
            return f"no rule of {where} holds"
        return f"rule {self.number} of {where}: {', '.join(self.backends)}: {self.rule.reason}"


def choose(site: Site, device: torch.device) -> Choice:
    """What the table of a device says of a call."""
    table = _table_of(device_name(device.type, device.index), os.environ.get(VARIABLE))
    for number, rule in enumerate(table.rules, start=1):
        if rule.holds(site):
            return Choice(table, number, rule)
    return Choice(table)


def preferred(site: Site, device: torch.device) -> tuple[str, ...]:
    """The backends of that choice alone: looked up once per site, or, by torch.compile, compared with sizes that may
    be symbols."""
    if torch.compiler.is_compiling():
        return _preferred(site, device.type, device.index, os.environ.get(VARIABLE))
    return _remembered(site, device.type, device.index, os.environ.get(VARIABLE))


def _preferred(site: Site, kind: str, index: int | None, named: str | None) -> tuple[str, ...]:
    for ranges, dtypes, directions, backends in _plain(kind, index, named):
        if _holds(ranges, dtypes, directions, site):
            return backends
    return ()


_remembered = functools.lru_cache(maxsize=1024)(_preferred)


@_dispatch.constant
def _plain(kind: str, index: int | None, named: str | None) -> tuple[tuple, ...]:
    """The rules of a device as nothing but tuples, the only constants that a traced graph takes."""
    return _as_tuples(_table_of(device_name(kind, index), named))


@functools.cache
def _as_tuples(table: Table) -> tuple[tuple, ...]:
    return tuple((rule.ranges, rule.dtypes, rule.directions, rule.backends) for rule in table.rules)


def device_name(kind: str, index: int | None) -> str:
    """As tables name it: "nvidia-h200", "cpu"."""
    return _gpu_name(index) if kind == "cuda" and torch.cuda.is_available() else kind


@functools.cache
def _gpu_name(index: int | None) -> str:
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(index).lower()).strip("-")


@functools.cache
def _table_of(device: str, named: str | None) -> Table:
    """The table of a device by name; `named`: the file that the user's environment names."""
    if named:
        return read(Path(named))
    found = next((path for path in (user_path(device), packaged_path(device)) if path.exists()), None)
    return read(found or packaged_path("default"))


def packaged_path(device: str) -> Path:
    return _PACKAGED / f"{device}.json"


def user_path(device: str) -> Path:
    """In the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "fastdistill" / "attention" / f"{device}.json"


# ---- reading --------------------------------------------------------------------------------------------------------


def read(path: Path) -> Table:
    """The table in a file. Raises TableError where it is none, naming the file and the entry."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise TableError(f"attention table {path}: {error.strerror}") from error
    except ValueError as error:
        raise TableError(f"attention table {path}: not JSON: {error}") from error
    try:
        return parse(content, str(path))
    except TableError as error:
        raise TableError(f"attention table {path}: {error}") from None


def parse(content: object, path: str = "") -> Table:
    """A table from the content of its file. Raises TableError naming the entry."""
    if not isinstance(content, dict) or not isinstance(content.get("rules"), list):
        raise TableError('expected an object with "device", "source" and a list "rules"')
    for key in ("device", "source"):
        if not isinstance(content.get(key), str):
            raise TableError(f"{key}: expected a string, got {content.get(key)!r}")
    rules = []
    for number, entry in enumerate(content["rules"], start=1):
        try:
            rules.append(_rule(entry))
        except TableError as error:
            raise TableError(f"rule {number}: {error}") from None
    return Table(path, content["device"], content["source"], tuple(rules))


def _rule(entry: object) -> Rule:
    if not isinstance(entry, dict):
        raise TableError(f"expected an object, got {entry!r}")
    known = (*RANGES, "dtype", "direction", "backends", "reason")
    for key in entry:
        if key not in known:
            raise TableError(f"unknown key {key!r}; known: {', '.join(known)}")
    if not isinstance(entry.get("reason"), str) or not entry["reason"]:
        raise TableError("reason: expected a sentence")
    if "backends" not in entry:
        raise TableError("backends: expected a list of at least one")
    return Rule(
        _names(entry, "backends", BACKENDS),
        entry["reason"],
        tuple(_range(key, entry.get(key, [1, None])) for key in RANGES),
        _names(entry, "dtype", DTYPES),
        _names(entry, "direction", DIRECTIONS),
    )


def _names(entry: Mapping[str, object], key: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = entry.get(key, list(known))
    if not isinstance(names, list) or not names or any(name not in known for name in names):
        raise TableError(f"{key}: expected a list of {', '.join(known)}, got {names!r}")
    return tuple(names)


def _range(key: str, ends: object) -> tuple[int, int]:
    if isinstance(ends, list) and len(ends) == 2:
        low, high = ends[0], UNLIMITED if ends[1] is None else ends[1]
        if type(low) is type(high) is int and 1 <= low <= high:
            return low, high
    raise TableError(f"{key}: expected [lowest, highest or null] with 1 <= lowest <= highest, got {ends!r}")
