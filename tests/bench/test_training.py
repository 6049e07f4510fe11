"""An update of each training method on both sides: the same losses, rows for its turns, nothing left switched over."""

import os

import pytest
import torch
from fastdistill.bench import rows, training
from fastdistill.bench.plain_training import Clock, PlainUpdate, TrainerUpdate, reference_ops
from fastdistill.training import DMDConfig

from fastdistill.ops import explain

every_method = pytest.mark.parametrize("method", training.CASES)


@every_method
def test_both_sides_of_an_update_compute_the_same_losses_and_move_the_weights_alike(method):
    clocks = Clock(), Clock()
    stages = [training.stage_of(method, "cpu") for _ in range(2)]
    ours, plain = TrainerUpdate(stages[0], clocks[0]), training.CASES[method].plain(stages[1], clocks[1])
    start = [p.clone() for p in stages[0].method.roles["student"].parameters()]
    mine, theirs = ours(), plain()
    assert set(theirs) == set(training.CASES[method].roles) == set(clocks[0].turns) == set(clocks[1].turns)
    for terms in theirs.values():
        for name, loss in terms.items():
            assert loss.abs() > 1e-6, name  # or there would be nothing to compare
            torch.testing.assert_close(mine[name], loss, rtol=1e-3, atol=1e-6)
    for role in theirs:
        for p, q in zip(*(stage.method.roles[role].parameters() for stage in stages)):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=2.1e-6)  # a step of 1e-6 may turn at a gradient of 0
    moved = zip(stages[0].method.roles["student"].parameters(), start)
    assert sum((p - q).abs().sum() for p, q in moved) > 0


@pytest.mark.parametrize("method", ["dmd2", "add"])
def test_the_exact_losses_are_of_float64_throughout(method):
    terms = training.CASES[method].plain(training.stage_of(method, "cpu", torch.float64), Clock())()
    assert {loss.dtype for losses in terms.values() for loss in losses.values()} == {torch.float64}


def test_the_references_serve_every_op_within_and_only_within(monkeypatch):
    def chosen():
        return explain("group_norm_silu", torch.randn(1, 8, 4, 4), 4, torch.ones(8), torch.zeros(8)).backend

    monkeypatch.setenv("FASTDISTILL_BACKEND", "geglu=reference")
    before = chosen()
    with reference_ops():
        assert chosen() == "reference"
    assert chosen() == before
    assert os.environ["FASTDISTILL_BACKEND"] == "geglu=reference"
    monkeypatch.delenv("FASTDISTILL_BACKEND")
    with reference_ops():
        pass
    assert "FASTDISTILL_BACKEND" not in os.environ


def test_rows_name_update_and_turns_and_say_how_the_turns_share_the_time(monkeypatch):
    monkeypatch.setattr(training, "CASES", {name: training.CASES[name] for name in ("dmd", "reflow")})
    found = [row for job in training.jobs("cpu", 2) for row in job.rows()]
    assert [row.key.mode for row in found] == [
        "dmd update",
        "dmd student turn",
        "dmd fake_score turn",
        "reflow update",
    ]
    update, student, fake_score, reflow = found
    for row in found:
        assert isinstance(row, rows.Row)
        assert row.status == "ok"
        assert row.speed.pairs == 2
    assert student.accuracy.result == "dmd"
    assert fake_score.accuracy.result == "fake_score"
    assert update.usage.peak_bytes > 10 * 4 * 1_000_000  # gradients, AdamW's two and the average, of two networks
    assert student.speed.ours_us + fake_score.speed.ours_us <= 1.5 * update.speed.ours_us
    ratio = DMDConfig().critic_ratio
    share = student.speed.ours_us / (student.speed.ours_us + ratio * fake_score.speed.ours_us)
    assert update.note.endswith(
        f"1 student turn {100 * share:.0f} %, {ratio} fake_score turns {100 - 100 * share:.0f} %"
    )
    assert reflow.note == ""


def test_the_plain_loop_counts_its_iterations_as_the_trainer_does():
    """Their numbers are functions of the iteration: only so are the second updates' losses the same again."""
    ours, plain = (make(training.stage_of("reflow", "cpu"), Clock()) for make in (TrainerUpdate, PlainUpdate))
    ours(), plain()
    second, theirs = ours()["reflow"], plain()["student"]["reflow"]
    torch.testing.assert_close(second, theirs, rtol=1e-4, atol=1e-7)
