"""DMD2 on Gaussians and on small UNets: who calls whom how often, what moves whom, and that resuming is exact."""

import pytest
import torch
from fastdistill.training import (
    Condition,
    Draws,
    GradientContractError,
    LatentData,
    Losses,
    PromptData,
    Step,
    Trainer,
    make_pairs,
)
from fastdistill.training.config import role_configs
from fastdistill.training.dmd2 import DMD2, DMD2Config
from fastdistill.training.fake_score import FakeScore
from fastdistill.training.settings import changed
from torch import nn

from fastdistill import diffusion

from .toys import CONDITIONS, TARGET_MEAN, TARGET_STD, GaussianNetwork, gaussian_teacher

SHAPE = (2,)
FOUR_STEPS = (999, 749, 499, 249)
QUICK = changed(
    DMD2Config(critic_ratio=3),
    trainer={"updates": 6, "batch_size": 16, "report_every": 1},
    student={"warm_up": 0},
    fake_score={"warm_up": 0},
)


class WithMiddle(GaussianNetwork):
    """Its prediction ends behind a middle, as a UNet's does."""

    def __init__(self, *args):
        super().__init__(*args)
        self.mid_block = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        self.finished = 0

    def forward(self, x_t, t, encoder_hidden_states, return_dict):
        self.mid_block(torch.cat([x_t, t[:, None] / 1000], dim=1))
        self.finished += 1
        return super().forward(x_t, t, encoder_hidden_states, return_dict)


def fake_score(seed=0):
    schedule = diffusion.scaled_linear(zero_terminal_snr=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FakeScore(WithMiddle(TARGET_MEAN, TARGET_STD, (0.2, 0.2), (-1.0, 1.0), schedule), nn.Linear(8, 1))


class Counting(GaussianNetwork):
    """A student that notes what it is called with, and whether a gradient is kept."""

    def forward(self, x_t, t, encoder_hidden_states, return_dict):
        self.seen = [*getattr(self, "seen", []), (x_t.detach(), int(t[0]), torch.is_grad_enabled())]
        return super().forward(x_t, t, encoder_hidden_states, return_dict)


def dmd2(config=QUICK, kind=DMD2, **options):
    teacher, schedule = gaussian_teacher()
    student = Counting(TARGET_MEAN, TARGET_STD, (0.2, 0.2), (-1.0, 1.0), schedule)
    return kind(teacher, schedule, "sample", config, student=student, fake_score=fake_score(), **options)


def real_data(mean=(0.0, 0.0)):
    samples = torch.randn(400, 2, generator=torch.Generator().manual_seed(5)) + torch.tensor(mean)
    return LatentData(samples, CONDITIONS, torch.zeros(400, 1, dtype=torch.long))


def trainer(config=QUICK, kind=DMD2, folder=None):
    return Trainer(dmd2(config, kind), real_data(), config.trainer, role_configs(config), folder=folder)


def step(batch_size=16, seed=0):
    draws = Draws(seed, batch_size=batch_size)
    return Step(real_data().batch(0, draws.fork("data")), draws)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("steps", range(4))
def test_backward_simulation_calls_the_student_exactly_k_times_all_without_gradient(steps):
    method = dmd2(changed(QUICK, student_steps=FOUR_STEPS))
    noise, condition = torch.randn(5, 2), CONDITIONS.expand(5)
    x_t = method.simulate(noise, condition, steps, Draws(3, batch_size=5))
    assert [(t, gradient) for _, t, gradient in getattr(method.student, "seen", [])] == [
        (t, False) for t in FOUR_STEPS[:steps]
    ]
    assert not x_t.requires_grad
    assert steps > 0 or torch.equal(x_t, noise)


def test_between_two_steps_the_sample_is_diffused_with_fresh_noise_to_the_next_timestep():
    method = dmd2(changed(QUICK, student_steps=FOUR_STEPS))
    noise, condition = torch.randn(5, 2), CONDITIONS.expand(5)
    x_t = method.simulate(noise, condition, 2, Draws(3, batch_size=5))
    draws, expected = Draws(3, batch_size=5), noise
    with torch.no_grad():
        for t, following in ((999, 749), (749, 499)):
            data = method.student(expected, torch.full((5,), t), None, False)[0]  # it predicts the data
            alpha, sigma = method.schedule.at(following)
            expected = alpha * data + sigma * draws.randn(2)
    torch.testing.assert_close(x_t, expected)


def test_the_last_of_the_drawn_steps_alone_keeps_a_gradient_and_every_step_is_drawn():
    method = dmd2(changed(QUICK, student_steps=FOUR_STEPS))
    lengths = set()
    for seed in range(40):
        method.student.seen = []
        x = method.sample(step(seed=seed))
        assert x.requires_grad
        timesteps, gradients = zip(*((t, gradient) for _, t, gradient in method.student.seen))
        assert timesteps == FOUR_STEPS[: len(timesteps)]
        assert gradients == (False,) * (len(timesteps) - 1) + (True,)
        lengths.add(len(timesteps))
    assert lengths == {1, 2, 3, 4}


def test_the_number_of_steps_is_the_same_for_every_process():
    def steps_of(rank):
        method = dmd2(changed(QUICK, student_steps=FOUR_STEPS))
        for place in range(10):
            draws = Draws(place, batch_size=4, rank=rank, world=3)
            method.sample(Step(real_data().batch(0, draws.fork("data")), draws))
        return [t for _, t, _ in method.student.seen]

    assert steps_of(0) == steps_of(1) == steps_of(2)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("ratio", [1, 5])
def test_the_fake_score_is_updated_in_every_iteration_and_the_student_in_every_nth(ratio, accumulation):
    config = changed(QUICK, critic_ratio=ratio, trainer={"updates": 4, "accumulation": accumulation})
    run = trainer(config).run()
    assert run.updates == {"student": 4, "fake_score": 4 * ratio}


def test_the_students_turn_gives_its_samples_to_the_fake_scores():
    seen = []

    class Recorder(DMD2):
        def losses(self, role, step):
            losses = super().losses(role, step)
            seen.append((role, step.memo["x"]))
            return losses

    trainer(kind=Recorder).run()
    (first, x), (then, again) = seen[-2:]
    assert (first, then) == ("student", "fake_score")
    assert x is again


def test_one_pass_of_the_fake_score_serves_denoising_and_discriminator():
    method = dmd2()
    network = method.fake_score.network
    method.losses("fake_score", step())
    assert network.finished == 1  # the real samples' pass ends behind the middle


def test_each_role_descends_the_terms_of_the_paper():
    method = dmd2(changed(QUICK, gan_weight=0.5, critic_gan_weight=0.25))
    at = step()
    student, critic = method.losses("student", at), method.losses("fake_score", at).whole()
    assert set(student.terms) == {"dmd", "gan"}
    assert set(critic.terms) == {"fake_score", "discriminator_fake", "discriminator_real"}
    # By hand, from the same numbers.
    x, draws, condition = at.memo["x"], at.draws, at.batch["condition"]
    t, noise = (gan := draws.fork("gan")).randint(0, 1000), gan.randn(2)
    logits = method.fake_score.logits(diffusion.add_noise(x, noise, *method.schedule.at(t)), t, condition)
    torch.testing.assert_close(student.terms["gan"], 0.5 * nn.functional.softplus(-logits).mean())
    fresh = step()  # the same draws anew
    t, noise = (real := fresh.draws.fork("real")).randint(0, 1000), real.randn(2)
    x_t = diffusion.add_noise(at.batch["data"], noise, *method.schedule.at(t))
    real_logits = method.fake_score.logits(x_t, t, condition)
    method.distribution_loss(x, condition, fresh.draws)  # moves the draws to where the critic's turn begins
    t, noise = fresh.draws.randint(0, 1000), fresh.draws.randn(2)
    fake_logits = method.fake_score.logits(diffusion.add_noise(x, noise, *method.schedule.at(t)), t, condition)
    expected = nn.functional.softplus(-real_logits).mean() + nn.functional.softplus(fake_logits).mean()
    found = critic.terms["discriminator_fake"] + critic.terms["discriminator_real"]
    torch.testing.assert_close(found, 0.25 * expected)


def test_without_a_gan_no_real_data_are_needed_and_without_the_distribution_loss_no_score():
    alone = dmd2(changed(QUICK, gan_weight=0))
    draws = Draws(0, batch_size=8)
    batch = PromptData(CONDITIONS, SHAPE).batch(0, draws)
    assert set(alone.losses("student", Step(batch, draws)).terms) == {"dmd"}
    assert set(alone.losses("fake_score", Step(batch, draws)).terms) == {"fake_score"}
    gan = dmd2(changed(QUICK, distribution_weight=0))
    assert set(gan.losses("student", step()).terms) == {"gan"}
    assert set(gan.losses("fake_score", step()).whole().terms) == {"discriminator_fake", "discriminator_real"}
    assert gan.teacher.calls == gan.fake_score.network.finished == 0
    with pytest.raises(ValueError, match=r"gan_weight 0\.003 needs real samples; the data has none"):
        dmd2().losses("fake_score", Step(batch, draws)).whole()


def test_the_gan_alone_carries_the_student_to_the_real_data_and_not_to_the_teachers():
    config = changed(
        QUICK,
        distribution_weight=0,
        gan_weight=1.0,
        critic_gan_weight=1.0,
        critic_ratio=2,
        trainer={"updates": 150, "batch_size": 64},
        student={"learning_rate": 0.03},
        fake_score={"learning_rate": 0.03},
    )
    run = trainer(config).run()
    assert run.student.bias.norm() < 0.3  # the data's mean; it began at (-1, 1), the teacher's is (2, -1)


def test_the_discriminators_term_trains_the_head_and_the_network_up_to_its_middle():
    method = dmd2()
    method.losses("fake_score", step()).whole().terms["discriminator_real"].backward()
    assert bool(method.fake_score.head.weight.grad.any())
    assert bool(method.fake_score.network.mid_block[0].weight.grad.any())
    assert method.fake_score.network.mean.grad is None


class NoGradient(DMD2):
    @torch.no_grad()
    def sample(self, step):
        return super().sample(step)


class TrainableHead(DMD2):
    def losses(self, role, step):
        if role == "student":
            self.fake_score.head.requires_grad_(True)
        return super().losses(role, step)


class TeacherWithGradient(DMD2):
    def losses(self, role, step):
        losses = super().losses(role, step)
        self.teacher.requires_grad_(True)
        noise = step.batch["noise"]
        real = self.teacher(noise, torch.full((len(noise),), 500), None, False)[0].mean()
        return Losses({name: term + real for name, term in losses.terms.items()})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NoGradient, "'dmd' gives no gradient to anything, 'student' included"),
        (TrainableHead, "'gan' must train 'student' alone, but 2 parameters of 'fake_score' received a gradient"),
        (TeacherWithGradient, "'dmd' must train 'student' alone, but .* parameters of 'teacher'"),
    ],
)
def test_a_role_that_is_wired_wrongly_is_refused_at_start_up(kind, message):
    with pytest.raises(GradientContractError, match=message):
        trainer(kind=kind).run()


@pytest.mark.parametrize("stop", range(1, 5))
def test_a_run_stopped_at_any_update_and_resumed_equals_the_uninterrupted_one_bit_for_bit(tmp_path, stop):
    config = changed(QUICK, student_steps=FOUR_STEPS, trainer={"updates": 5, "accumulation": 2, "ema_decay": 0.9})
    whole = trainer(config)
    whole.run()
    trainer(config, folder=tmp_path).run(lambda progress: progress.update == stop)
    resumed = trainer(config, folder=tmp_path)
    assert resumed.resume() == stop
    resumed.run()
    assert same(resumed.average.network.state_dict(), whole.average.network.state_dict())
    for role in ("student", "fake_score"):
        assert same(resumed.method.roles[role].state_dict(), whole.method.roles[role].state_dict())


def test_a_student_at_399_takes_unit_noise_and_is_read_at_that_timesteps_alpha_and_sigma():
    class Epsilon(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.3))

        def forward(self, x_t, t, encoder_hidden_states, return_dict):
            self.seen = (x_t, t)
            return (self.weight * x_t,)

    schedule = diffusion.scaled_linear()
    config = changed(QUICK, student_steps=(399,), gan_weight=0)
    method = DMD2(Epsilon(), schedule, "epsilon", config)
    z = torch.randn(6, 2)
    x = method.generate(z, CONDITIONS.expand(6))
    torch.testing.assert_close(method.student.seen[0], z)
    assert method.student.seen[1].tolist() == [399] * 6
    torch.testing.assert_close(x, (z - 0.758 * 0.3 * z) / 0.653, rtol=2e-3, atol=0)
    torch.testing.assert_close(
        x, method.sample(Step({"noise": z, "condition": CONDITIONS.expand(6)}, Draws(0, batch_size=6)))
    )


def test_the_regression_term_joins_where_it_has_a_weight():
    config = changed(QUICK, gan_weight=0, regression_weight=0.25)
    method = dmd2(config)
    pairs = make_pairs(method.teacher, CONDITIONS, method.schedule, "sample", count=8, sample_shape=SHAPE, steps=4)
    draws = Draws(0, batch_size=8)
    batch = PromptData(CONDITIONS, SHAPE, pairs).batch(0, draws)
    term = method.losses("student", Step(batch, draws)).whole().terms["regression"]
    carried = method.generate(batch["pair_noise"], batch["pair_condition"])
    torch.testing.assert_close(term, 0.25 * (carried - batch["pair_sample"]).square().mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"critic_ratio": 0}, "critic_ratio must be 1 or more; got 0"),
        ({"student_steps": ()}, r"student_steps must be one or more timesteps, descending.*got \(\)"),
        ({"student_steps": (249, 499)}, r"student_steps must be .* descending.*got \(249, 499\)"),
        ({"student_steps": (499, 0)}, "the last at least 1"),
        ({"gan_weight": -1.0}, "gan_weight must be 0 or more"),
        ({"gan_weight": 0.0, "distribution_weight": 0.0}, "nothing would train the student"),
        ({"critic_gan_weight": 0.0}, "needs critic_gan_weight above 0"),
        ({"warm_up_updates": 5, "pairs": 0}, "need pairs; got pairs = 0"),
        ({"regression": "ssim"}, "regression must be one of l2, pixel_l2, lpips; got ssim"),
        ({"regression": "lpips"}, "needs lpips_backbone"),
    ],
)
def test_a_bad_configuration_names_the_field_the_value_and_the_need(change, message):
    with pytest.raises(ValueError, match=message):
        changed(QUICK, **change)


def test_what_the_roles_lack_is_named():
    teacher, schedule = gaussian_teacher()
    with pytest.raises(ValueError, match="needs a FakeScore, a score network with a head; got NoneType"):
        DMD2(teacher, schedule, "sample", QUICK)
    with pytest.raises(ValueError, match="GaussianNetwork has no mid_block"):
        FakeScore(teacher, nn.Linear(8, 1))
    with pytest.raises(ValueError, match=r"student_steps must be below 1000; got \(1200,\)"):
        dmd2(changed(QUICK, student_steps=(1200,)))


def test_a_guided_teacher_and_an_unguided_fake_score():
    method = dmd2(changed(QUICK, guidance_scale=1.75), unconditional=Condition(torch.zeros(1, 1, 1)))
    method.losses("student", step())
    assert method.teacher.calls == 2
    assert method.fake_score.network.calls == 1
