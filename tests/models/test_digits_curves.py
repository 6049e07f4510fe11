"""Curves of training runs, read from their logs."""

import json

import numpy as np
import pytest
from PIL import Image

from fastdistill.models.digits.curves import Curve, draw_curves, read_curve


def record(stage, update, seconds, validated=None, fd=None):
    figures = {} if fd is None else {"fd": fd, "accuracy": 1 - fd / 10, "diversity": 1.0}
    return {
        "stage": stage, "method": "instaflow", "update": update, "seconds": seconds, "validated": validated,
        "validation": figures,
    }  # fmt: skip


def write(folder, *records):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


def test_a_validation_counts_once_and_after_the_stages_before(tmp_path):
    folder = write(
        tmp_path / "run",
        record("reflow-1", 10, 5.0),
        record("reflow-1", 20, 10.0),
        record("distillation", 10, 2.0, validated=5, fd=3.0),
        record("distillation", 20, 4.0, validated=5, fd=3.0),
        record("distillation", 30, 6.0, validated=30, fd=1.0),
    )
    assert read_curve(folder) == Curve("instaflow", (12.0, 16.0), (3.0, 1.0), (0.7, 0.9))


def test_a_run_that_was_not_validated_or_not_watched_is_named(tmp_path):
    folder = write(tmp_path / "run", record("dmd", 10, 5.0))
    with pytest.raises(ValueError, match=r"no validation of digits in it; train with --set validation\.kind=digits"):
        read_curve(folder)
    with pytest.raises(ValueError, match="needed the folder of a watched run"):
        read_curve(tmp_path / "nothing")


def test_every_method_has_a_colour_of_its_own(tmp_path):
    one = Curve("add", (0.0, 10.0), (5.0, 1.0), (0.5, 0.9))
    other = Curve("dmd", (0.0, 10.0), (4.0, 0.5), (0.6, 0.95))
    for name, curves in (("alone", [one]), ("twice", [one, one]), ("both", [one, other])):
        draw_curves(curves, tmp_path / f"{name}.png")
    alone, twice, both = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("alone", "twice", "both"))
    second_colour = (255, 127, 14)
    assert not (alone[..., :3] == second_colour).all(-1).any()
    assert not (twice[..., :3] == second_colour).all(-1).any()
    assert (both[..., :3] == second_colour).all(-1).any()
