"""ADD on the ring of Gaussians, where the teacher is exact."""

import copy

import pytest
import torch
from fastdistill.training import (
    ADD,
    ADDConfig,
    Condition,
    Draws,
    GradientContractError,
    Losses,
    Step,
    Trainer,
    Turn,
)
from fastdistill.training.settings import changed, from_dict
from fastdistill.training.target import Target

from fastdistill import diffusion
from fastdistill.losses import hinge_generator_loss, nfsd_loss

from .ring import (
    CONDITION,
    PREDICTION_TYPE,
    SCHEDULE,
    SHAPE,
    RingData,
    RingFeatures,
    RingTeacher,
    StudentMLP,
    ring_samples,
    ring_scores,
)

QUICK = from_dict(
    ADDConfig,
    {
        "trainer": {"updates": 4, "batch_size": 8, "report_every": 2, "ema_decay": 0.9},
        "student": {"learning_rate": 1e-3, "warm_up": 0},
        "discriminator": {"learning_rate": 2e-3},
        "text_condition": False,
        "image_condition": False,
        "augmentation": "",
        "features": "a ring's",
        "student_every": 1,
        "timesteps": (249, 499, 749, 999),
        "distill_weight": 2.5,
        "r1_interval": 2,
        "r1_weight": 1e-2,
    },
)


def ring_method(config=QUICK, method=ADD, schedule=SCHEDULE, prediction_type=PREDICTION_TYPE, **target):
    teacher = RingTeacher(schedule, prediction_type)
    return method(
        StudentMLP(width=32), Target(teacher, schedule, prediction_type, **target), RingFeatures(), schedule,
        prediction_type, config, text_width=1,
    )  # fmt: skip


def trainer(method, folder=None, data=None):
    data = RingData(count=500) if data is None else data
    return Trainer(method, data, method.config.trainer, method.role_configs(), folder=folder)


def step(batch_size=8, key="test", **more):
    draws = Draws(key, batch_size=batch_size)
    return Step(RingData(count=500).batch(0, draws.fork("data")) | more, draws)


def one_step(student, count=4000):
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        v = student(noise, torch.full((count,), 999))[0]
    return diffusion.to_data(v, noise, 0.0, 1.0, PREDICTION_TYPE)


def train_on_the_ring(updates, seed=0, **changes):
    config = changed(
        QUICK,
        trainer={"updates": updates, "batch_size": 64, "seed": seed, "ema_decay": 0.99},
        timesteps=(999,),
        distill_weight=0.1,
        r1_weight=2e-5,
        **changes,
    )
    target = Target(RingTeacher(), SCHEDULE, PREDICTION_TYPE)
    method = ADD(StudentMLP(seed=seed), target, RingFeatures(), SCHEDULE, PREDICTION_TYPE, config)
    return ring_scores(one_step(trainer(method, data=RingData(seed=seed)).run().student))


def test_one_step_reaches_all_eight_modes_of_the_ring():
    distance, modes, _ = train_on_the_ring(250)
    assert distance < 0.45
    assert modes == 8


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_one_step_stays_within_the_band_on_the_ring(seed):
    distance, modes, share = train_on_the_ring(2000, seed)
    assert distance < 0.31
    assert modes == 8
    assert share > 0.04


def test_both_roles_learn_in_every_iteration_and_on_the_same_samples():
    seen = []

    class Recorder(ADD):
        def losses(self, role, step):
            losses = super().losses(role, step)
            seen.append((role, step.memo.get("fake")))
            return losses

    method = ring_method(method=Recorder)
    before = {name: copy.deepcopy(network.state_dict()) for name, network in method.roles.items()}
    run = trainer(method).run()
    assert run.updates == {"student": 4, "discriminator": 4}
    (first, fake), (then, again) = seen[-2:]
    assert (first, then) == ("student", "discriminator")
    assert fake is again
    assert not any(tokens.requires_grad for tokens in fake)
    for role, network in method.roles.items():
        moved = any(not torch.equal(value, before[role][name]) for name, value in network.state_dict().items())
        assert moved == (role in ("student", "discriminator")), role


def test_the_turns_come_as_often_as_configured_and_the_discriminator_makes_its_own_samples_where_it_must():
    run = trainer(ring_method(changed(QUICK, student_every=3))).run()
    assert run.updates == {"student": 4, "discriminator": 12}
    run = trainer(ring_method(changed(QUICK, discriminator_every=2))).run()
    assert run.updates == {"student": 4, "discriminator": 2}


def test_the_lazy_penalty_is_an_optimiser_step_of_its_own_with_the_learning_rate_and_betas_of_its_share():
    method = ring_method(changed(QUICK, r1_mode="lazy", discriminator={"beta1": 0.5, "beta2": 0.9}))
    assert method.turns[-1] == Turn("discriminator", 2, asks_for="r1")
    configured = method.role_configs()["discriminator"]
    share = 2 / 3
    assert configured.learning_rate == pytest.approx(2e-3 * share)
    assert (configured.beta1, configured.beta2) == pytest.approx((0.5**share, 0.9**share))
    assert trainer(method).run().updates == {"student": 4, "discriminator": 4 + 2}
    tokens = [torch.randn(8, 16, 8) for _ in range(2)]
    method._real_tokens = lambda _: tokens
    exact = ring_method(changed(QUICK, r1_mode="exact"))
    exact.discriminator.load_state_dict(method.discriminator.state_dict())
    exact._real_tokens = method._real_tokens
    with_penalty = exact.losses("discriminator", step()).logs["r1"]
    exact.discriminator.load_state_dict(method.discriminator.state_dict())
    # One forward pass with its power iteration stands before neither: within its tolerance.
    torch.testing.assert_close(method.losses("r1", step()).terms["r1"].detach(), 2 * with_penalty, rtol=0.2, atol=0)


def test_the_student_sees_noised_data_at_its_timesteps_and_noise_alone_at_the_last():
    seen = []

    class Recorder(StudentMLP):
        def forward(self, x_t, t, **options):
            seen.append((x_t.detach().clone(), t))
            return super().forward(x_t, t, **options)

    target = Target(RingTeacher(), SCHEDULE, PREDICTION_TYPE)
    method = ADD(Recorder(), target, RingFeatures(), SCHEDULE, PREDICTION_TYPE, changed(QUICK, timesteps=(249, 999)))
    given = step(batch_size=32)
    method.losses("student", given)
    (x_t, t), batch = seen[0], given.batch
    assert set(t.tolist()) == {249, 999}
    last = t == 999
    torch.testing.assert_close(x_t[last], batch["noise"][last], rtol=0, atol=0)
    expected = diffusion.add_noise(batch["data"], batch["noise"], *SCHEDULE.at(t))
    torch.testing.assert_close(x_t[~last], expected[~last])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_schedule_that_ends_before_pure_noise_is_made_to_and_only_for_the_students_input(prediction_type):
    schedule = diffusion.scaled_linear()  # Stable Diffusion's: alpha ends at 0.068
    method = ring_method(schedule=schedule, prediction_type=prediction_type)
    t, noise = torch.full((8,), 999), torch.randn(8, 2)
    first, second = (
        method.generate(data, noise, t, CONDITION.expand(8)) for data in (torch.randn(8, 2), torch.ones(8, 2))
    )
    assert torch.equal(first, second)
    pred = method.student(noise, t)[0]
    alpha, sigma = schedule.at(999)
    expected = (noise - sigma * pred) / alpha if prediction_type == "epsilon" else -pred
    torch.testing.assert_close(first, expected)
    assert method.target.schedule.alpha[-1] == alpha
    # Where there is data in the input, nothing is different from the teacher's schedule.
    t = torch.full((8,), 749)
    here = method.generate(torch.ones(8, 2), noise, t, CONDITION.expand(8))
    x_t = diffusion.add_noise(torch.ones(8, 2), noise, *schedule.at(t))
    torch.testing.assert_close(
        here, diffusion.to_data(method.student(x_t, t)[0], x_t, *schedule.at(t), prediction_type)
    )


@pytest.mark.parametrize(("prediction_type", "ends_in_noise"), [("epsilon", False), ("v_prediction", True)])
def test_the_saved_scheduler_reads_the_students_step_as_training_does(prediction_type, ends_in_noise):
    from diffusers import DDIMScheduler

    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    scheduler = DDIMScheduler(prediction_type=prediction_type, **options)
    method = ring_method(schedule=diffusion.from_scheduler(scheduler), prediction_type=prediction_type)
    saved = method.scheduler(scheduler)
    assert (float(saved.alphas_cumprod[-1]) == 0) == ends_in_noise
    saved.set_timesteps(1)
    assert saved.timesteps.tolist() == [999]
    noise = torch.randn(8, 2)
    with torch.no_grad():
        x = method.generate(torch.zeros(8, 2), noise, torch.full((8,), 999), CONDITION.expand(8))
        stepped = saved.step(method.student(noise, torch.full((8,), 999))[0], 999, noise).prev_sample
    torch.testing.assert_close(stepped, x, rtol=1e-4, atol=1e-4)
    saved.set_timesteps(4)
    assert saved.timesteps.tolist() == [999, 749, 499, 249]


def distillation_gradient(config, x, **target):
    method = ring_method(config, **target)
    x = x.clone().requires_grad_()
    draws = Draws("distillation", batch_size=len(x))
    loss = method.distillation_loss(x, x, CONDITION.expand(len(x)), draws)
    loss.backward()
    again = Draws("distillation", batch_size=len(x))
    t, noise = again.randint(0, 1000), again.randn(2)
    return loss.detach(), x.grad, t, noise


def eps_of(teacher, x_t, t):
    return diffusion.to_noise(teacher(x_t, t)[0], x_t, *SCHEDULE.at(t), PREDICTION_TYPE)


def test_with_the_sds_weighting_the_gradient_is_score_distillations():
    x = ring_samples(16, seed=3) + 0.2
    _, gradient, t, noise = distillation_gradient(changed(QUICK, weighting="sds", distill_space="latent"), x)
    alpha, sigma = SCHEDULE.at(t)
    x_t = diffusion.add_noise(x, noise, alpha, sigma)
    eps = eps_of(RingTeacher(), x_t, t)
    torch.testing.assert_close(gradient, sigma[:, None] ** 2 * (eps - noise) / x.numel(), rtol=1e-3, atol=1e-6)


def test_the_exponential_weighting_is_alpha_times_the_distance_to_the_teachers_denoising_of_the_diffused_sample():
    x = ring_samples(16, seed=3) + 0.2
    loss, gradient, t, noise = distillation_gradient(changed(QUICK, distill_space="latent"), x)
    alpha, sigma = SCHEDULE.at(t)
    x_t = diffusion.add_noise(x, noise, alpha, sigma)
    mu = RingTeacher().denoise(x_t, alpha[:, None], sigma[:, None])
    torch.testing.assert_close(loss, (alpha * (x - mu).square().mean(1)).mean(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gradient, 2 * alpha[:, None] * (x - mu) / x.numel(), rtol=1e-3, atol=1e-6)


class Prompted(RingTeacher):
    """Draws towards a mixture that is shifted by what the condition says."""

    def forward(self, x_t, t, encoder_hidden_states=None, return_dict=False):
        alpha, sigma = self.schedule.at(t)
        shift = encoder_hidden_states[:, 0, :1]
        mu = self.denoise(x_t - alpha[:, None] * shift, alpha[:, None], sigma[:, None]) + shift
        return (diffusion.convert(mu, x_t, alpha, sigma, "sample", self.prediction_type),)


def test_noise_free_score_distillation_takes_three_predictions_of_the_teacher():
    teacher, x = Prompted(), ring_samples(16, seed=3)
    conditions = [Condition(torch.full((1, 1, 1), shift)) for shift in (0.5, 0.0, -0.5)]
    options = {"unconditional": conditions[1], "negative": conditions[2]}
    config = changed(QUICK, weighting="nfsd", distill_space="latent")
    target = Target(teacher, SCHEDULE, PREDICTION_TYPE, **options)
    method = ADD(StudentMLP(), target, RingFeatures(), SCHEDULE, PREDICTION_TYPE, config)
    x.requires_grad_()
    method.distillation_loss(x, None, conditions[0].expand(16), Draws("nfsd", batch_size=16)).backward()
    draws = Draws("nfsd", batch_size=16)
    t, noise = draws.randint(0, 1000), draws.randn(2)
    alpha, sigma = SCHEDULE.at(t)
    x_t = diffusion.add_noise(x.detach(), noise, alpha, sigma)
    cond, uncond, negative = (
        diffusion.to_noise(
            teacher(x_t, t, condition.expand(16).states)[0], x_t, alpha, sigma, PREDICTION_TYPE
        )
        for condition in conditions
    )  # fmt: skip
    late = (t >= 200).float()[:, None]
    expected = sigma[:, None] ** 2 * (uncond - late * negative + 7.5 * (cond - uncond))
    torch.testing.assert_close(x.grad, expected / x.numel(), rtol=1e-4, atol=1e-7)
    assert nfsd_loss(x, cond, uncond, uncond, t, sigma**2, 0.0) >= 0


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_teacher_of_several_steps_ends_where_its_sampler_does(steps):
    class Counter(RingTeacher):
        calls = 0

        def forward(self, x_t, t, **options):
            self.calls += 1
            return super().forward(x_t, t, **options)

    teacher = Counter()
    target = Target(teacher, SCHEDULE, PREDICTION_TYPE, steps=steps)
    x_t, start = torch.randn(8, 2), torch.full((8,), 800)
    found = target.denoise(x_t, start, CONDITION.expand(8))
    assert teacher.calls == steps
    for index in range(steps):
        t = 800 * (steps - index) // steps
        pred = teacher(x_t, torch.full((8,), t))[0]
        after = 800 * (steps - index - 1) // steps
        if index < steps - 1:
            x_t = diffusion.ddim_step(pred, x_t, *SCHEDULE.at(t), *SCHEDULE.at(after), PREDICTION_TYPE)
    torch.testing.assert_close(found, diffusion.to_data(pred, x_t, *SCHEDULE.at(t), PREDICTION_TYPE))


def test_the_adversarial_term_is_the_hinge_on_undetached_features_and_can_be_summed_over_heads():
    mean, summed = (ring_method(changed(QUICK, heads=heads, distill_weight=0)) for heads in ("mean", "sum"))
    summed.student.load_state_dict(mean.student.state_dict())
    summed.discriminator.load_state_dict(mean.discriminator.state_dict())
    terms = [method.losses("student", step()).terms for method in (mean, summed)]
    torch.testing.assert_close(terms[1]["adversarial"], 2 * terms[0]["adversarial"])
    x, _ = mean._sample(step())
    mean.discriminator.load_state_dict(ring_method().discriminator.state_dict())
    expected = hinge_generator_loss(mean.discriminator(mean.features(x).tokens))
    mean.discriminator.load_state_dict(ring_method().discriminator.state_dict())
    torch.testing.assert_close(mean.losses("student", step()).terms["adversarial"], expected)


@pytest.mark.parametrize("mode", ["exact", "lazy", "approximate", "finite_difference"])
@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, mode, stopped_after):
    config = changed(QUICK, r1_mode=mode, trainer={"accumulation": 2})
    whole = trainer(ring_method(config))
    whole.run()
    stopped = trainer(ring_method(config), tmp_path)
    for _ in range(stopped_after):
        stopped.iterate()
    stopped.save()
    torch.manual_seed(123)
    resumed = trainer(ring_method(config), tmp_path)
    assert resumed.resume() == stopped_after
    resumed.run()
    for role in ("student", "discriminator"):
        theirs, ours = whole.method.roles[role].state_dict(), resumed.method.roles[role].state_dict()
        assert all(torch.equal(value, ours[name]) for name, value in theirs.items()), role
    averages = whole.average.network.state_dict(), resumed.average.network.state_dict()
    assert all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())


@pytest.mark.parametrize("mode", ["exact", "approximate"])
def test_global_random_state_plays_no_part(mode):
    def weights(seed):
        torch.manual_seed(seed)
        return trainer(ring_method(changed(QUICK, r1_mode=mode))).run().student.state_dict()

    first, again = weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_student_made_without_gradient_is_refused_at_start_up():
    class NoGradient(ADD):
        @torch.no_grad()
        def generate(self, *args):
            return super().generate(*args)

    with pytest.raises(GradientContractError, match="'adversarial' gives no gradient"):
        trainer(ring_method(method=NoGradient)).run()


def test_features_made_without_gradient_are_refused_at_start_up():
    class Detached(ADD):
        def _tokens(self, *args):
            return tuple(tokens.detach() for tokens in super()._tokens(*args))

    with pytest.raises(GradientContractError, match="'adversarial' gives no gradient"):
        trainer(ring_method(method=Detached)).run()


@pytest.mark.parametrize("intruder", ["discriminator", "teacher", "features"])
def test_a_role_left_trainable_in_the_students_turn_is_refused_at_start_up(intruder):
    class Leaky(ADD):
        def losses(self, role, step):
            if role == "student":
                self.roles[intruder].requires_grad_(True)
            losses = super().losses(role, step)
            if role == "student" and intruder == "teacher":
                # The adversarial term would not reach the teacher: what denoises without no_grad does.
                leak = self.target.network(step.batch["noise"], torch.full((len(step.batch["noise"]),), 500))[0].mean()
                losses = Losses({name: term + leak for name, term in losses.terms.items()})
            return losses

    with pytest.raises(GradientContractError, match=rf"must train 'student' alone.*'{intruder}'"):
        trainer(ring_method(method=Leaky)).run()
