"""The plan of a run: found by one update of every role, in memory, and true of the run itself."""

import pytest
import torch
from fastdistill.training import DMDConfig, GradientContractError, Trainer, distill
from fastdistill.training import dmd as dmd_module
from fastdistill.training import regression as regression_module
from fastdistill.training.plan import plan
from fastdistill.training.settings import changed

from .toys import tiny_pipeline

PROMPTS = ["a handwritten seven", "two"]
CONFIG = changed(DMDConfig(critic_ratio=3, pairs=100, pair_steps=2), trainer={"updates": 40, "batch_size": 4})


@pytest.fixture(scope="module")
def teacher():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def found(teacher):
    return plan(teacher, PROMPTS, CONFIG)


def roles(found):
    (stage,) = found.stages
    return {role.role: role for role in stage.roles}


def test_updates_and_samples_are_those_of_the_whole_run(found):
    (stage,) = found.stages
    assert {name: role.updates for name, role in roles(found).items()} == {
        "student": 40,
        "teacher": None,
        "fake_score": 120,
    }
    assert (stage.updates, stage.samples) == (40, 40 * 3 * 4)
    assert set(stage.losses) >= {"dmd", "regression", "fake_score"}


def test_bytes_are_those_of_float32_weights_gradients_moments_and_average(found, teacher):
    weights = 4 * sum(p.numel() for p in teacher.unet.parameters())
    student, frozen, fake = (roles(found)[name] for name in ("student", "teacher", "fake_score"))
    assert student.weight_bytes == student.gradient_bytes == student.average_bytes == weights
    assert 2 * weights < student.optimizer_bytes < 2.01 * weights
    assert fake.optimizer_bytes == student.optimizer_bytes
    assert (frozen.weight_bytes, frozen.gradient_bytes, frozen.optimizer_bytes) == (weights, 0, 0)
    assert (fake.average_bytes, frozen.saved_bytes) == (0, 0)


def test_the_activations_of_a_pass_grow_with_the_batch(found, teacher):
    half = plan(teacher, PROMPTS, changed(CONFIG, trainer={"batch_size": 2}))
    for name in ("student", "fake_score"):
        whole, part = roles(found)[name].saved_bytes, roles(half)[name].saved_bytes
        assert part < whole <= 2 * part
    # The student has two passes, one of them for the regression.
    assert roles(found)["student"].saved_bytes > 1.5 * roles(found)["fake_score"].saved_bytes


def test_the_expected_time_is_that_of_one_update_for_each_and_of_all_pairs(found):
    (stage,) = found.stages
    assert stage.seconds == pytest.approx(stage.preparation_seconds + 40 * stage.update_seconds)


def test_no_more_than_a_batch_of_pairs_is_solved(teacher, monkeypatch):
    counts = []
    before = regression_module.pairs_for

    def counting(setup, **options):
        counts.append(options["count"])
        return before(setup, **options)

    monkeypatch.setattr(regression_module, "pairs_for", counting)
    plan(teacher, PROMPTS, CONFIG)
    assert counts == [4]


def test_a_run_after_its_plan_is_the_run_without_one(teacher):
    config = changed(CONFIG, pairs=4, trainer={"updates": 2})
    expected = distill(tiny_pipeline(), PROMPTS, config).run.student.state_dict()
    pipeline = tiny_pipeline()
    plan(pipeline, PROMPTS, config)
    student = distill(pipeline, PROMPTS, config).run.student.state_dict()
    assert all(torch.equal(student[name], expected[name]) for name in expected)


def test_a_broken_gradient_contract_is_what_the_plan_says(teacher, monkeypatch):
    class NoGradient(dmd_module.DMD):
        @torch.no_grad()
        def generate(self, noise, condition):
            return super().generate(noise, condition)

    monkeypatch.setattr(dmd_module, "DMD", NoGradient)
    with pytest.raises(GradientContractError, match="gives no gradient"):
        plan(teacher, PROMPTS, CONFIG)


def test_the_optimisers_bytes_are_counted_and_not_known_beforehand(teacher, monkeypatch):
    class Wide(Trainer):
        def _updater(self, turn, config):
            made = super()._updater(turn, config)
            made.optimizer.state_bits = 8
            return made

    monkeypatch.setattr("fastdistill.training.plan.Trainer", Wide)
    large = [p for p in teacher.unet.parameters() if p.numel() >= 4096]
    narrow = roles(plan(teacher, PROMPTS, CONFIG))["student"].optimizer_bytes
    weights = sum(p.numel() for p in teacher.unet.parameters())
    saved = 6 * sum(p.numel() for p in large)  # two moments, three bytes less each; their scales come back
    assert 8 * weights - saved < narrow < 8 * weights - 0.9 * saved


def test_every_role_has_its_turn_and_no_more_than_is_needed(teacher, monkeypatch):
    turns = []
    before = Trainer.iterate

    def counting(self):
        before(self)
        turns.append(self.iteration)

    monkeypatch.setattr(Trainer, "iterate", counting)
    plan(teacher, PROMPTS, CONFIG)
    assert turns == [1, 2, 3]
