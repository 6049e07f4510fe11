"""Configurations as YAML and as dotted names: read, checked, written. An unknown name is refused with the nearest."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

Config = TypeVar("Config")


class SettingsError(ValueError):
    """A configuration that cannot be read; the message names the setting, what was given and what is needed."""


def from_dict(
    kind: type[Config], values: Mapping[str, Any], defaults: Config | None = None, *, place: str = ""
) -> Config:
    """A `kind`, a dataclass of dataclasses, from nested `values`; what they leave out is as in `defaults`.

    place: what stands before the names in messages, "method." for example.

    Raises:
        SettingsError: an unknown name, a value of a wrong type, one that is missing, or one that the dataclass refuses.
    """
    known = {field.name: field for field in fields(kind) if field.init}
    hints = typing.get_type_hints(kind)
    if defaults is None and all(_default(field) is not MISSING for field in known.values()):
        defaults = kind()
    arguments = {} if defaults is None else {name: getattr(defaults, name) for name in known}
    for name, value in values.items():
        if name not in known:
            raise SettingsError(f"{place}{name}: unknown setting; {_nearest(str(name), kind, defaults, place)}")
        default = arguments.get(name, _default(known[name]))
        inner = _inner(hints[name], default)
        if inner is not None and isinstance(value, Mapping):
            started = default if isinstance(default, inner) else None
            arguments[name] = from_dict(inner, value, started, place=f"{place}{name}.")
        else:
            arguments[name] = _typed(value, hints[name], inner, f"{place}{name}")
    for name, field in known.items():
        if name not in arguments and _default(field) is MISSING:
            raise SettingsError(f"{place}{name}: is missing; needed {needed(hints[name])}")
    try:
        return kind(**arguments)
    except SettingsError:
        raise
    except ValueError as error:
        message = str(error)
        named = message.split(maxsplit=1)[0].rstrip(":") in known
        raise SettingsError(f"{place}{message}" if named or not place else f"{place[:-1]}: {message}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries of what YAML and JSON hold: what `from_dict` reads."""
    return plain(asdict(config))


def from_yaml(path: str | Path) -> dict[str, Any]:
    """The nested values of a YAML file.

    Raises:
        SettingsError: no such file, not YAML, a name given twice, or no mapping of names to values.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: needed names with values, as in `critic_ratio: 5`; got {_shown(values)}")
    return values


def to_yaml(config: Any) -> str:
    """What `from_yaml` reads, every field written out in its order."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Nested values of lines `student.learning_rate=1e-4`, the value in YAML.

    Raises:
        SettingsError: a line without a name or an equals sign, or a name given twice in two ways.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise SettingsError(f"--set {setting}: needed NAME=VALUE, as in student.learning_rate=1e-4")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise SettingsError(f"--set {setting}: {text!r} is no YAML value") from error
        *path, last = name.strip().split(".")
        place = values
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise SettingsError(f"--set {setting}: {part} was given a value before")
        if isinstance(place.get(last), dict):
            raise SettingsError(f"--set {setting}: settings of {last} were given before")
        place[last] = value
    return values


def changed(config: Config, **changes: Any) -> Config:
    """The configuration with nested values in place of its own: `changed(config, trainer={"updates": 3})`."""
    return from_dict(type(config), changes, config)


def plain(value: Any) -> Any:
    """The value as YAML and JSON hold it: tuples as lists, paths as text."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def needed(hint: Any) -> str:
    """In words, what a setting of this type takes: "a whole number or nothing (null)"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(needed(each) for each in sorted(arguments, key=lambda each: each is types.NoneType))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (tuple, list):
        return f"a list ({needed(arguments[0])} each)" if arguments else "a list"
    if is_dataclass(hint):
        return "settings of its own"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def leaves(config: Any, place: str = "") -> Iterator[tuple[str, Any, Any, Any]]:
    """(dotted name, value, dataclass, field name) of every setting that has no settings of its own, in their order."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{place}{field.name}.")
        else:
            yield f"{place}{field.name}", value, type(config), field.name


class _Loader(yaml.SafeLoader):
    """YAML in which a name given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                place = f"line {key.start_mark.line + 1}"
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice ({place})")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    types.NoneType: "nothing (null)",
}


def _typed(value: Any, hint: Any, inner: type | None, place: str) -> Any:
    if inner is not None and isinstance(value, inner):
        return value
    truth = isinstance(value, bool) and hint is not bool and bool not in typing.get_args(hint)
    try:
        if truth and hint is not Any:  # which pydantic would take for 0 or 1
            raise SettingsError
        return TypeAdapter(hint).validate_python(value)
    except (ValidationError, SettingsError):
        raise SettingsError(f"{place}: needed {needed(hint)}; got {_shown(value)}") from None


def _inner(hint: Any, default: Any) -> type | None:
    """The dataclass that a field holds: its default's, or the one that its type names."""
    if is_dataclass(default) and not isinstance(default, type):
        return type(default)
    kinds = [each for each in (hint, *typing.get_args(hint)) if is_dataclass(each)]
    return kinds[0] if len(kinds) == 1 else None


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _nearest(name: str, kind: type, config: Any, place: str) -> str:
    """Where the name may have been meant: near it at this level, or by that name further inside."""
    known = [field.name for field in fields(kind) if field.init]
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {place}{near[0]}?"
    inside = [path for path, *_ in leaves(config, place)] if config is not None else []
    last = {path: path.rpartition(".")[2] for path in inside}
    near = difflib.get_close_matches(name, sorted(set(last.values())), n=1)
    if near:
        return f"did you mean {' or '.join(path for path in inside if last[path] == near[0])}?"
    return f"known are {', '.join(known)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
