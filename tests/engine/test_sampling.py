"""Plans against the diffusers schedulers they were read from, with a made-up network."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler

from fastdistill.engine.sampling import ExplicitSteps, FoldedSteps, make_plan
from fastdistill.models import ModelError

from .conftest import v_prediction_ddim

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT_SCALE = 1 / 0.18215
SHAPE = (2, 4, 3, 5)
SCHEDULERS = {
    "the bundled models": v_prediction_ddim(),
    "DDIM, epsilon, leading": DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "DDIM, epsilon, trailing": DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing"),
    "DDIM, sample, linspace": DDIMScheduler(
        **SD, clip_sample=False, prediction_type="sample", timestep_spacing="linspace"
    ),
    "Euler, epsilon, trailing (SD-Turbo)": EulerDiscreteScheduler(**SD, timestep_spacing="trailing"),
    "Euler, epsilon, leading": EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1),
    "Euler, v, linspace": EulerDiscreteScheduler(**SD, prediction_type="v_prediction"),
    "Euler, v, zero SNR": EulerDiscreteScheduler(
        **SD, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "Euler, Karras sigmas": EulerDiscreteScheduler(**SD, use_karras_sigmas=True),
    "Euler, smallest sigma last": EulerDiscreteScheduler(**SD, final_sigmas_type="sigma_min"),
    "LCM, epsilon": LCMScheduler(**SD),
    "LCM, v": LCMScheduler(**SD, prediction_type="v_prediction"),
}
CLIPPING = {
    "DDIM": DDIMScheduler(**SD, clip_sample=True, clip_sample_range=0.7),
    "LCM": LCMScheduler(**SD, clip_sample=True),
}


def network(x, t):
    """Some smooth function of both, of the size of a prediction."""
    return torch.tanh(0.8 * x.flip(-1) + 0.001 * float(t)) + 0.3 * torch.roll(x, 1, 1)


def noises(count):
    return torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def by_diffusers(scheduler, num_steps, noise):
    """What StableDiffusionPipeline does around its networks, up to the decoder's input."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(num_steps)
    draws = iter(noise[1:])
    x = noise[0] * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(draws))
            x = scheduler.step(network(x_in, t), t, x, return_dict=False)[0]
    return x * LATENT_SCALE


def by_plan(kind, plan, noise):
    steps = kind(plan, LATENT_SCALE)
    x = steps.begin(noise[0])
    for index, step in enumerate(plan.steps):
        fresh = noise[index + 1] if index + 1 < len(noise) else None
        x = steps.advance(index, network(x, step.timestep), x, fresh)
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 4, 25])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_plan_samples_what_its_diffusers_scheduler_samples(name, num_steps):
    plan = make_plan(SCHEDULERS[name], num_steps)
    noise = noises(1 + plan.fresh_noises)
    exact = by_diffusers(SCHEDULERS[name], num_steps, noise)
    # diffusers keeps its tables, and Euler its samples, in float32.
    tolerance = 2e-5 * exact.abs().max()
    assert (by_plan(ExplicitSteps, plan, noise) - exact).abs().max() < tolerance


@pytest.mark.parametrize("num_steps", [1, 2, 4, 25])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_folding_scales_into_each_step_changes_nothing_in_float64(name, num_steps):
    plan = make_plan(SCHEDULERS[name], num_steps)
    noise = noises(1 + plan.fresh_noises)
    exact = by_plan(ExplicitSteps, plan, noise)
    assert (by_plan(FoldedSteps, plan, noise) - exact).abs().max() < 1e-10 * exact.abs().max()


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("name", CLIPPING)
def test_clipped_predictions_are_clipped_as_diffusers_does(name, num_steps):
    plan = make_plan(CLIPPING[name], num_steps)
    noise = noises(1 + plan.fresh_noises)
    exact = by_diffusers(CLIPPING[name], num_steps, noise)
    assert (by_plan(ExplicitSteps, plan, noise) - exact).abs().max() < 2e-5 * exact.abs().max()


def test_one_step_of_the_bundled_models_is_minus_the_prediction():
    steps = FoldedSteps(make_plan(v_prediction_ddim(), 1), LATENT_SCALE)
    x, prediction = noises(2)
    assert torch.equal(steps.begin(x), x)
    torch.testing.assert_close(steps.advance(0, prediction, x, None), -prediction * LATENT_SCALE, rtol=1e-15, atol=0)


def test_timesteps_are_the_schedulers_own():
    assert [int(step.timestep) for step in make_plan(v_prediction_ddim(), 4).steps] == [999, 749, 499, 249]
    assert [int(step.timestep) for step in make_plan(SCHEDULERS["DDIM, epsilon, leading"], 1).steps] == [1]
    assert [float(step.timestep) for step in make_plan(SCHEDULERS["Euler, v, linspace"], 3).steps] == [999, 499.5, 0]
    assert [int(step.timestep) for step in make_plan(SCHEDULERS["LCM, epsilon"], 4).steps] == [999, 759, 499, 259]


def test_a_timestep_below_zero_that_rounding_adds_is_left_out():
    scheduler = v_prediction_ddim()
    scheduler.set_timesteps(61)
    assert scheduler.timesteps[-1] == -1
    assert len(make_plan(scheduler, 61).steps) == 61


def test_only_lcm_draws_fresh_noise_and_not_for_its_last_step():
    assert make_plan(SCHEDULERS["LCM, epsilon"], 4).fresh_noises == 3
    assert make_plan(SCHEDULERS["LCM, epsilon"], 1).fresh_noises == 0
    assert make_plan(SCHEDULERS["Euler, v, linspace"], 4).fresh_noises == 0


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (PNDMScheduler(**SD), "scheduler PNDMScheduler: this engine samples DDIMScheduler, EulerDiscreteScheduler"),
        (DDIMScheduler(**SD, thresholding=True), "DDIMScheduler with thresholding=True"),
        (EulerDiscreteScheduler(**SD, prediction_type="sample"), 'prediction_type="sample"'),
    ],
)
def test_a_scheduler_that_is_not_known_is_named(scheduler, message):
    with pytest.raises(ModelError, match=message):
        make_plan(scheduler, 1)


@pytest.mark.parametrize(("scheduler", "steps"), [(v_prediction_ddim(), 1001), (LCMScheduler(**SD), 51)])
def test_more_steps_than_a_scheduler_has_are_refused(scheduler, steps):
    with pytest.raises(ValueError, match=f"steps={steps}: {type(scheduler).__name__}"):
        make_plan(scheduler, steps)


def test_epsilon_prediction_at_zero_terminal_snr_is_refused():
    with pytest.raises(ValueError, match=r"DDIMScheduler visits t = 999, where .* alpha = 0"):
        make_plan(v_prediction_ddim(prediction_type="epsilon"), 1)
