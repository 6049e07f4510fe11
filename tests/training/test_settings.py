"""Configurations from nested values: what is read, what is refused and with which words, and what is written."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from fastdistill.training import DMDConfig, RoleConfig
from fastdistill.training.documented import commented_yaml, field_docs
from fastdistill.training.registry import METHODS, config_class
from fastdistill.training.settings import SettingsError, from_dict, from_settings, from_yaml, to_dict, to_yaml


@dataclass(frozen=True)
class Part:
    """A part.

    Attributes:
        size: in pixels.
        low, high: the range,
            as shares.
    """

    size: int
    low: float = 0.1
    high: float = 0.9


@dataclass(frozen=True)
class Whole:
    """A whole.

    Attributes:
        steps: to take: some.
        part: see it.
        kind: which.
        folder: where.
        extra: another part.
    """

    name: ClassVar[str] = "whole"
    steps: tuple[int, ...] = (1, 2)
    part: Part = field(default_factory=lambda: Part(8))
    kind: Literal["round", "square"] = "round"
    folder: Path | None = None
    extra: Part | None = None
    on: bool = False


def test_what_is_left_out_is_as_in_the_defaults_at_every_level():
    config = from_dict(Whole, {"part": {"low": 0.2}, "steps": [3]}, Whole(part=Part(16), on=True))
    assert config == Whole(steps=(3,), part=Part(16, low=0.2), on=True)


def test_values_as_yaml_writes_them_become_the_types_of_the_fields():
    config = from_dict(Whole, {"folder": "a/b", "part": {"low": "1e-4"}, "extra": {"size": 3}})
    assert config.folder == Path("a/b")
    assert config.part.low == 1e-4
    assert config.extra == Part(3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 1}, "step: unknown setting; did you mean steps?"),
        ({"part": {"hihg": 1}}, "part.hihg: unknown setting; did you mean part.high?"),
        ({"extra": {"size": 3, "hihg": 1}}, "extra.hihg: unknown setting; did you mean extra.high?"),
        ({"size": 1}, "size: unknown setting; did you mean part.size?"),
        ({"zzz": 1}, "zzz: unknown setting; known are steps, part, kind, folder, extra, on"),
        ({"steps": "x"}, "steps: needed a list (a whole number each); got 'x'"),
        ({"part": 3}, "part: needed settings of its own; got 3"),
        ({"part": {"size": 2.5}}, "part.size: needed a whole number; got 2.5"),
        ({"part": {"size": True}}, "part.size: needed a whole number; got True"),
        ({"part": {"low": "low"}}, "part.low: needed a number; got 'low'"),
        ({"kind": "oval"}, "kind: needed one of round, square; got 'oval'"),
        ({"folder": 3}, "folder: needed a path or nothing (null); got 3"),
        ({"on": "perhaps"}, "on: needed true or false; got 'perhaps'"),
        ({"extra": {"low": 0.5}}, "extra.size: is missing; needed a whole number"),
    ],
)
def test_what_cannot_be_is_refused_by_its_dotted_name(values, message):
    with pytest.raises(SettingsError) as refused:
        from_dict(Whole, values)
    assert str(refused.value) == message


def test_a_name_that_several_parts_have_is_looked_for_in_all_of_them():
    with pytest.raises(SettingsError) as refused:
        from_dict(DMDConfig, {"learning_rat": 1e-4})
    assert str(refused.value).endswith("did you mean student.learning_rate or fake_score.learning_rate?")


def test_what_a_dataclass_itself_refuses_is_named_by_its_place():
    with pytest.raises(SettingsError, match=r"^method\.student\.learning_rate must be more than 0; got -1\.0$"):
        from_dict(DMDConfig, {"student": {"learning_rate": -1}}, place="method.")


def test_single_settings_become_nested_values():
    settings = from_settings(["a.b=1e-4", "a.c=[1, 2]", "d=null", "e=x=y"])
    assert from_dict(RoleConfig, {"learning_rate": settings["a"].pop("b")}) == RoleConfig(1e-4)
    assert settings == {"a": {"c": [1, 2]}, "d": None, "e": "x=y"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["a"], "needed NAME=VALUE"),
        (["=1"], "needed NAME=VALUE"),
        (["a=[1"], "no YAML value"),
        (["a=1", "a.b=2"], "a was given a value before"),
        (["a.b=2", "a=1"], "settings of a were given before"),
    ],
)
def test_a_setting_that_is_none_is_quoted(settings, message):
    with pytest.raises(SettingsError, match=message) as refused:
        from_settings(settings)
    assert f"--set {settings[-1]}" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"a is given twice \(line 3\)"),
        ("- 1\n", "needed names with values"),
        ("a: [1\n", "cannot be read"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=f"run.yaml: .*{message}"):
        from_yaml(file)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(SettingsError, match=r"run\.yaml: cannot be read: No such file"):
        from_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("write", [to_yaml, commented_yaml])
def test_every_methods_configuration_goes_through_yaml_unchanged(name, write, tmp_path):
    config = config_class(name)()
    file = tmp_path / "config.yaml"
    file.write_text(write(config))
    assert from_dict(type(config), from_yaml(file)) == config
    assert from_dict(type(config), to_dict(config)) == config


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_every_method_is_documented(name):
    def undocumented(kind, config, place=""):
        for field_name in vars(config):
            if field_name not in field_docs(kind):
                yield place + field_name
            value = getattr(config, field_name)
            if hasattr(value, "__dataclass_fields__"):
                yield from undocumented(type(value), value, f"{place}{field_name}.")

    config = config_class(name)()
    assert list(undocumented(type(config), config)) == []


def test_comments_are_what_the_docstrings_say():
    assert commented_yaml(Whole(extra=Part(4))) == (
        "# to take: some.\nsteps: [1, 2]\n"
        "# see it.\npart:\n  # in pixels.\n  size: 8\n  # the range, as shares.\n  low: 0.1\n  high: 0.9\n"
        "# which.\nkind: round\n# where.\nfolder: null\n"
        "# another part.\nextra:\n  size: 4\n  low: 0.1\n  high: 0.9\n"
        "on: false\n"
    )
