"""The DMD loop on Gaussians, where the fake score and the answer are known, and its bookkeeping."""

import pytest
import torch
from fastdistill.training import (
    DMD,
    Condition,
    DMDConfig,
    GradientContractError,
    Losses,
    PromptData,
    Trainer,
    make_pairs,
)
from fastdistill.training.config import role_configs
from fastdistill.training.settings import changed

from .toys import CONDITIONS, TARGET_MEAN, TARGET_STD, gaussian_teacher

SHAPE = (2,)
QUICK = changed(
    DMDConfig(critic_ratio=3, regression_weight=0),
    trainer={"updates": 6, "batch_size": 16, "report_every": 2},
    student={"warm_up": 0},
    fake_score={"warm_up": 0},
)


def roles(config=QUICK, **options):
    teacher, schedule = gaussian_teacher()
    return DMD(teacher, schedule, "sample", config, **options)


def train(dmd, pairs=None, conditions=CONDITIONS, callback=None):
    data = PromptData(conditions, SHAPE, pairs)
    return Trainer(dmd, data, dmd.config.trainer, role_configs(dmd.config)).run(callback)


def test_the_student_moves_onto_the_teachers_distribution():
    config = changed(
        QUICK,
        trainer={"updates": 300, "batch_size": 128},
        student={"learning_rate": 0.03},
        fake_score={"learning_rate": 0.03},
        critic_ratio=5,
    )
    dmd = roles(config)
    run = train(dmd)
    x = run.student.gain * torch.randn(20000, 2, generator=torch.Generator().manual_seed(7)) + run.student.bias
    torch.testing.assert_close(x.mean(0), torch.tensor(TARGET_MEAN), rtol=0, atol=0.15)
    torch.testing.assert_close(x.std(0), torch.tensor(TARGET_STD), rtol=0, atol=0.15)
    # The fake score has followed the student there.
    torch.testing.assert_close(dmd.fake_score.mean.detach(), torch.tensor(TARGET_MEAN), rtol=0, atol=0.25)


def test_the_regression_term_alone_carries_each_noise_where_the_ode_does():
    config = changed(
        QUICK,
        trainer={"updates": 300},
        student={"learning_rate": 0.05},
        critic_ratio=1,
        regression_weight=100.0,
    )
    dmd = roles(config)
    with torch.no_grad():
        dmd.teacher.gain.zero_()
        dmd.teacher.bias.copy_(dmd.teacher.mean)
    pairs = make_pairs(dmd.teacher, CONDITIONS, dmd.schedule, "sample", count=200, sample_shape=SHAPE, steps=100)
    run = train(dmd, pairs)
    torch.testing.assert_close(run.student.bias, torch.tensor(TARGET_MEAN), rtol=0, atol=0.1)
    torch.testing.assert_close(run.student.gain, torch.tensor(TARGET_STD), rtol=0, atol=0.1)


@pytest.mark.parametrize("ratio", [1, 3, 5])
def test_the_fake_score_is_updated_critic_ratio_times_per_student_update(ratio):
    dmd = roles(changed(QUICK, critic_ratio=ratio))
    run = train(dmd)
    assert run.updates == {"student": 6, "fake_score": 6 * ratio}
    # Twice per turn for the contract check. Then one sample per batch, one teacher pass per student turn.
    assert dmd.student.calls == 4 + 6 * ratio
    assert dmd.teacher.calls == 2 + 6
    assert dmd.fake_score.calls == 4 + 6 * ratio + 6


def test_the_fake_score_learns_on_every_batch_and_the_student_on_the_last_of_each_round():
    turns = []

    class Recorder(DMD):
        def losses(self, role, step):
            turns.append(role)
            return super().losses(role, step)

    teacher, schedule = gaussian_teacher()
    train(Recorder(teacher, schedule, "sample", QUICK))
    contract_check = 2 * ["student"] + 2 * ["fake_score"]
    assert turns == contract_check + 6 * ["fake_score", "fake_score", "student", "fake_score"]


def test_the_fake_score_learns_on_the_very_samples_of_the_students_turn():
    seen = []

    class Recorder(DMD):
        def losses(self, role, step):
            losses = super().losses(role, step)
            seen.append((role, step.memo["x"]))
            return losses

    teacher, schedule = gaussian_teacher()
    train(Recorder(teacher, schedule, "sample", QUICK))
    (first, x), (then, again) = seen[-2:]
    assert (first, then) == ("student", "fake_score")
    assert x is again


def test_the_teacher_does_not_change():
    dmd = roles()
    before = {name: value.clone() for name, value in dmd.teacher.state_dict().items()}
    train(dmd)
    assert all(torch.equal(value, before[name]) for name, value in dmd.teacher.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in dmd.student.state_dict().items())


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    def weights(seed):
        return train(roles(changed(QUICK, trainer={"seed": seed}))).student.state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_global_random_state_plays_no_part():
    torch.manual_seed(1)
    first = train(roles()).student.state_dict()
    torch.manual_seed(2)
    again = train(roles()).student.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_only_the_teacher_is_guided_and_it_keeps_no_graph():
    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))
            self.seen, self.graphs = [], set()

        def forward(self, x_t, t, encoder_hidden_states, return_dict):
            self.seen.append(encoder_hidden_states.flatten().unique().tolist())
            self.graphs.add(torch.is_grad_enabled())
            return (self.weight * x_t + encoder_hidden_states[:, 0],)

    _, schedule = gaussian_teacher()
    config = changed(QUICK, guidance_scale=2.0)
    dmd = DMD(Recorder(), schedule, "sample", config, unconditional=Condition(torch.full((1, 1, 1), -1.0)))
    train(dmd, conditions=Condition(torch.full((1, 1, 1), 3.0)))
    assert [-1.0] in dmd.teacher.seen
    assert dmd.teacher.graphs == {False}
    assert all(seen == [3.0] for network in (dmd.student, dmd.fake_score) for seen in network.seen)


def test_distributions_are_compared_only_within_the_timestep_range_and_the_fake_score_learns_everywhere():
    seen = {"teacher": [], "fake_score": []}

    class Recorder(DMD):
        def _diffuse(self, x, low, high, draws):
            seen["teacher" if low else "fake_score"].append((low, high))
            return super()._diffuse(x, low, high, draws)

    teacher, schedule = gaussian_teacher()
    train(Recorder(teacher, schedule, "sample", QUICK))
    assert set(seen["teacher"]) == {(20, 981)}
    assert set(seen["fake_score"]) == {(0, 1000)}


def test_the_callback_sees_progress_and_can_end_the_run():
    seen = []
    run = train(roles(), callback=seen.append)
    assert [progress.update for progress in seen] == [2, 4, 6]
    assert all(progress.total == 6 for progress in seen)
    assert set(seen[0].losses) == {"dmd", "guarded", "fake_score"}
    assert run.losses == seen[-1].losses
    assert run.ended == "finished"
    stopped = train(roles(), callback=lambda progress: progress.update == 4)
    assert stopped.updates == {"student": 4, "fake_score": 12}
    assert stopped.ended == "callback"


def test_a_student_made_without_gradient_is_refused_at_start_up():
    class NoGradient(DMD):
        @torch.no_grad()
        def generate(self, noise, condition):
            return super().generate(noise, condition)

    teacher, schedule = gaussian_teacher()
    with pytest.raises(GradientContractError, match="'dmd' gives no gradient"):
        train(NoGradient(teacher, schedule, "sample", QUICK))


@pytest.mark.parametrize("intruder", ["teacher", "fake_score"])
def test_a_role_that_the_method_leaves_trainable_in_the_students_turn_is_refused_at_start_up(intruder):
    class Leaky(DMD):
        def losses(self, role, step):
            if role == "student":
                self.roles[intruder].requires_grad_(True)
                pred = self.roles[intruder](
                    step.batch["noise"], torch.zeros(len(step.batch["noise"])).long(), None, None
                )
                losses = super().losses(role, step)
                return Losses({"dmd": losses.terms["dmd"] + pred[0].mean()})
            return super().losses(role, step)

    teacher, schedule = gaussian_teacher()
    with pytest.raises(GradientContractError, match=rf"'dmd' must train 'student' alone.*'{intruder}'"):
        train(Leaky(teacher, schedule, "sample", QUICK))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer": {"updates": 0}}, "updates must be 1 or more; got 0"),
        ({"critic_ratio": 0}, "critic_ratio must be 1 or more; got 0"),
        ({"student": {"learning_rate": 0.0}}, r"learning_rate must be more than 0; got 0\.0"),
        ({"fake_score": {"learning_rate": float("nan")}}, "learning_rate must be more than 0; got nan"),
        ({"student": {"beta1": 1.0}}, r"beta1 must be in \[0, 1\)"),
        ({"trainer": {"ema_decay": 1.0}}, r"ema_decay must be in \[0, 1\)"),
        ({"min_timestep": 0.99}, r"min_timestep must be in \[0, max_timestep\)"),
        ({"max_timestep": 1.0}, "max_timestep must be below 1"),
        ({"regression_weight": 0.5, "pairs": 0}, "needs pairs; got pairs = 0"),
    ],
)
def test_a_bad_configuration_names_the_field_the_value_and_the_need(change, message):
    with pytest.raises(ValueError, match=message):
        changed(QUICK, **change)


def test_what_the_roles_lack_is_named():
    with pytest.raises(ValueError, match=r"student_timestep must be in 0\.\.999; got 1000"):
        roles(changed(QUICK, student_timestep=1000))
    with pytest.raises(ValueError, match=r"guidance_scale 2\.0 needs the condition of the empty prompt"):
        roles(changed(QUICK, guidance_scale=2.0))
    with pytest.raises(ValueError, match=r"regression_weight 0\.5 needs pairs"):
        train(roles(changed(QUICK, regression_weight=0.5)))
