"""What the dataclasses of a configuration say of their fields, for `--help` and for YAML with comments."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import yaml

from .settings import leaves, plain

_WIDTH = 100
_ENTRY = re.compile(r"([a-z_0-9]+\*?(?:, [a-z_0-9]+\*?)*): (.*)")


def summary(kind: type) -> str:
    """The first paragraph of a class's docstring, as one line."""
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def field_docs(kind: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say under "Attributes:" of each field, as one line.

    Fields that are described together share it.
    """
    docs: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        docs |= _own_docs(each)
    return docs


def _own_docs(kind: type) -> dict[str, str]:
    docs: dict[str, str] = {}
    names: list[str] = []
    _, _, attributes = inspect.cleandoc(kind.__dict__.get("__doc__") or "").partition("Attributes:\n")
    for line in attributes.splitlines():
        if line and not line.startswith(" "):
            break
        entry = _ENTRY.match(line.strip()) if line.startswith("    ") and not line.startswith("     ") else None
        if entry:
            names = entry[1].replace("*", "").split(", ")
            docs |= dict.fromkeys(names, entry[2])
        elif line.strip():
            docs |= {name: f"{docs[name]} {line.strip()}" for name in names}
    return docs


def described(config: Any, place: str = "") -> list[tuple[str, str, str]]:
    """(dotted name, value, description) of every setting that has no settings of its own."""
    return [(name, shown(value), field_docs(kind).get(field, "")) for name, value, kind, field in leaves(config, place)]


def shown(value: Any) -> str:
    """A value as one would type it: in YAML, on one line."""
    if isinstance(value, str) and value:
        return yaml.safe_dump(value, width=10**6).removesuffix("\n...\n").strip()
    return yaml.safe_dump(plain(value), default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def commented_yaml(config: Any) -> str:
    """Every field of a dataclass of dataclasses as YAML, each behind what its docstring says of it, once."""
    return "\n".join(_lines(config, "", set())) + "\n"


def _lines(config: Any, indent: str, told: set[type]) -> Iterator[str]:
    docs = {} if type(config) in told else field_docs(type(config))
    told.add(type(config))
    before = ""
    for field in fields(config):
        doc = docs.get(field.name, "")
        if doc and doc != before:  # fields that are described together follow one another
            yield from textwrap.wrap(doc, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        before = doc
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield f"{indent}{field.name}:"
            if field.name == "method":  # whose settings they are
                yield f"{indent}  name: {value.method}"
            yield from _lines(value, f"{indent}  ", told)
        else:
            yield f"{indent}{field.name}: {shown(value)}"
