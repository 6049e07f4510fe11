"""Configurations as YAML and as dotted names: read, checked, written. An unknown name is refused with the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

Config = TypeVar("Config")


class SettingsError(ValueError):
    """A configuration that cannot be read; the message names the setting, what was given and what is needed."""


def from_dict(kind: type[Config], values: Mapping[str, Any], defaults: Config | None = None) -> Config:
    """A `kind`, a dataclass of dataclasses, from nested `values`; what they leave out is as in `defaults`.

    Raises:
        SettingsError: an unknown name, a value of a wrong type, or one that the dataclass refuses.
    """
    defaults = kind() if defaults is None else defaults
    _refuse_unknown(values, defaults)
    try:
        return TypeAdapter(kind).validate_python(_merged(asdict(defaults), values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or kind.__name__
        message = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{place}: {message}; got {_shown(first['input'])}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries of plain values: what `from_dict` reads."""
    return asdict(config)


def from_yaml(path: str | Path) -> dict[str, Any]:
    """The nested values of a YAML file.

    Raises:
        SettingsError: no such file, not YAML, or no mapping of names to values.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: cannot be read ({error})") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: needed names with values, as in `critic_ratio: 5`; got {_shown(values)}")
    return values


def to_yaml(config: Any) -> str:
    """What `from_yaml` reads, every field written out in its order."""
    return yaml.safe_dump(_plain(to_dict(config)), sort_keys=False)


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
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SettingsError(f"--set {setting}: {text!r} is no YAML value") from error
        *path, last = name.strip().split(".")
        place = values
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise SettingsError(f"--set {setting}: {part} was given a value before")
        place[last] = value
    return values


def changed(config: Config, **changes: Any) -> Config:
    """The configuration with nested values in place of its own: `changed(config, trainer={"updates": 3})`."""
    return from_dict(type(config), changes, config)


def _refuse_unknown(values: Mapping[str, Any], config: Any, place: str = "") -> None:
    known = {field.name: getattr(config, field.name) for field in fields(config)}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {place}{near[0]}?" if near else f"known are {', '.join(known)}"
            raise SettingsError(f"{place}{name}: unknown setting; {hint}")
        if is_dataclass(known[name]):
            if not isinstance(value, Mapping):
                raise SettingsError(f"{place}{name}: needed settings of its own; got {_shown(value)}")
            _refuse_unknown(value, known[name], f"{place}{name}.")


def _merged(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in values.items():
        nested = isinstance(value, Mapping) and isinstance(base.get(name), dict)
        merged[name] = _merged(base[name], value) if nested else value
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
