"""The plain loop and this one on the same update of DMD: equal losses, and what the options are for."""

import re

import pytest
import torch
from fastdistill.bench import training_memory
from fastdistill.bench.plain_training import Clock, TrainerUpdate
from fastdistill.bench.training_memory import OPTIONS, PLAIN, PlainLoop, stage_of
from fastdistill.training import Teacher

from fastdistill.models import build


@pytest.fixture(scope="module")
def teacher():
    return Teacher(build("sd15-tiny"))


def update(make, teacher, memory=PLAIN):
    return training_memory._losses(make(stage_of(teacher, memory, 1, "float32"), Clock())())


@pytest.mark.parametrize("name", OPTIONS)
def test_every_set_of_options_computes_the_losses_of_the_plain_loop(name, teacher):
    ours, plain = update(TrainerUpdate, teacher, OPTIONS[name]), update(PlainLoop, teacher)
    assert set(ours) == set(plain) == {"dmd", "regression", "fake_score"}
    for loss, value in plain.items():
        assert value.abs() > 1e-6
        torch.testing.assert_close(ours[loss], value, rtol=1e-3, atol=1e-6)


def test_a_row_says_both_peaks_and_ours_is_lower(monkeypatch):
    monkeypatch.setattr(training_memory, "BATCH", 1)
    monkeypatch.setattr(training_memory, "PLANNED", "sd15-tiny")
    monkeypatch.setattr(training_memory, "small", lambda: training_memory.find_architecture("sd15-tiny"))
    monkeypatch.setattr(training_memory, "OPTIONS", {"blocks, 8-bit moments": list(OPTIONS.values())[-1]})
    (job,) = training_memory.jobs("cpu", 1)
    (row,) = job.rows()
    assert row.status == "ok"
    assert row.key.mode == "dmd lpips update, blocks, 8-bit moments"
    plain = float(re.search(r"the plain loop ([\d,]+) MiB", row.note)[1].replace(",", "")) * 2**20
    assert 0.3 * plain < row.usage.peak_bytes < 0.8 * plain
