"""fastdistill.diffusion against closed forms and against diffusers' own schedulers."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from fastdistill import diffusion
from fastdistill.diffusion import PREDICTION_TYPES

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ends(batch, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 2, 3, 2, generator=generator, dtype=torch.float64).to(dtype)


def ddim(**options):
    return DDIMScheduler(**{**STABLE_DIFFUSION, "clip_sample": False, **options})


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        ("epsilon", lambda data, noise, alpha, sigma: noise),
        ("sample", lambda data, noise, alpha, sigma: data),
        ("v_prediction", lambda data, noise, alpha, sigma: alpha * noise - sigma * data),
        ("flow_prediction", lambda data, noise, alpha, sigma: noise - data),
        ("instaflow", lambda data, noise, alpha, sigma: data - noise),
    ],
)
def test_each_type_is_the_combination_its_literature_defines(prediction_type, expected):
    data, noise = ends(3)
    alpha, sigma = torch.tensor([0.9, 0.6, 0.1]).double(), torch.tensor([0.1, 0.8, 0.9]).double()
    target = diffusion.training_target(data, noise, alpha, sigma, prediction_type)
    a, s = alpha.view(3, 1, 1, 1), sigma.view(3, 1, 1, 1)
    torch.testing.assert_close(target, expected(data, noise, a, s), rtol=0, atol=0)


@pytest.mark.parametrize("schedule_name", ["stable_diffusion", "zero_terminal_snr", "flow"])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTION_TYPES, PREDICTION_TYPES)))
def test_every_type_converts_to_every_other_at_every_timestep_where_the_map_exists(schedule_name, source, target):
    schedule = {
        "stable_diffusion": diffusion.scaled_linear(dtype=torch.float64),
        "zero_terminal_snr": diffusion.scaled_linear(dtype=torch.float64, zero_terminal_snr=True),
        "flow": diffusion.flow(dtype=torch.float64),
    }[schedule_name]
    alpha, sigma = schedule.alpha, schedule.sigma
    if source == "epsilon" and target != "epsilon":
        alpha, sigma = alpha[alpha > 0], sigma[alpha > 0]
    assert len(alpha) >= 999
    data, noise = ends(len(alpha))
    x_t = diffusion.add_noise(data, noise, alpha, sigma)
    pred = diffusion.training_target(data, noise, alpha, sigma, source)
    converted = diffusion.convert(pred, x_t, alpha, sigma, source, target)
    wanted = diffusion.training_target(data, noise, alpha, sigma, target)
    # alpha falls to 7e-4 before zero terminal SNR: dividing by it costs that many of float64's 16 digits.
    torch.testing.assert_close(converted, wanted, rtol=1e-11, atol=1e-11)


def test_data_noise_and_score_from_v_are_the_textbook_formulas():
    data, noise = ends(4)
    alpha, sigma = diffusion.scaled_linear(dtype=torch.float64).at([0, 250, 600, 999])
    a, s = alpha.view(4, 1, 1, 1), sigma.view(4, 1, 1, 1)
    x_t = diffusion.add_noise(data, noise, alpha, sigma)
    v = a * noise - s * data
    torch.testing.assert_close(diffusion.to_data(v, x_t, alpha, sigma, "v_prediction"), a * x_t - s * v)
    torch.testing.assert_close(diffusion.to_noise(v, x_t, alpha, sigma, "v_prediction"), s * x_t + a * v)
    score = diffusion.to_score(v, x_t, alpha, sigma, "v_prediction")
    torch.testing.assert_close(score, -(x_t - a * data) / s**2)


def test_instaflow_time_runs_towards_data():
    data, noise = ends(2)
    t = torch.tensor([0.0, 0.7]).double()  # 0 is noise, 1 is data
    x_t = t.view(2, 1, 1, 1) * data + (1 - t).view(2, 1, 1, 1) * noise
    velocity = data - noise
    torch.testing.assert_close(
        diffusion.to_data(velocity, x_t, t, 1 - t, "instaflow"), x_t + (1 - t).view(2, 1, 1, 1) * velocity
    )


def test_the_optimal_gaussian_denoiser_gives_the_exact_score():
    mean, std = 1.5, 0.3
    alpha, sigma = diffusion.scaled_linear(dtype=torch.float64).at([5, 400, 990])
    a, s = alpha.view(3, 1), sigma.view(3, 1)
    x_t = torch.linspace(-3, 3, 30, dtype=torch.float64).reshape(3, 10).requires_grad_()
    mu = mean + a * std**2 / (a**2 * std**2 + s**2) * (x_t - a * mean)
    log_density = torch.distributions.Normal(a * mean, (a**2 * std**2 + s**2).sqrt()).log_prob(x_t)
    (exact,) = torch.autograd.grad(log_density.sum(), x_t)
    torch.testing.assert_close(diffusion.to_score(mu, x_t, alpha, sigma, "sample"), exact)


def test_straight_path_has_the_interpolation_and_velocity_of_rectified_flow():
    data, noise = ends(3)
    alpha, sigma = diffusion.scaled_linear(dtype=torch.float64).at([10, 500, 999])
    x_t = diffusion.add_noise(data, noise, alpha, sigma)
    x_tau, tau = diffusion.to_straight_path(x_t, alpha, sigma)
    torch.testing.assert_close(tau, sigma / (alpha + sigma))
    torch.testing.assert_close(x_tau, (1 - tau).view(3, 1, 1, 1) * data + tau.view(3, 1, 1, 1) * noise)
    v = diffusion.convert(noise, x_t, alpha, sigma, "epsilon", "flow_prediction")
    torch.testing.assert_close(v, noise - data)
    torch.testing.assert_close(diffusion.convert(v, x_tau, 1 - tau, tau, "flow_prediction", "sample"), data)


def test_epsilon_at_pure_noise_is_refused_and_v_is_not():
    schedule = diffusion.scaled_linear(zero_terminal_snr=True)
    data, noise = ends(2, dtype=torch.float32)
    alpha, sigma = schedule.at([500, 999])
    x_t = diffusion.add_noise(data, noise, alpha, sigma)
    with pytest.raises(ValueError, match=r"epsilon.*alpha = 0.*original=True"):
        diffusion.to_data(noise, x_t, alpha, sigma, "epsilon")
    with pytest.raises(ValueError, match="alpha = 0"):
        diffusion.to_data(noise, x_t, 0.0, 1.0, "epsilon")
    v = diffusion.training_target(data, noise, alpha, sigma, "v_prediction")
    torch.testing.assert_close(diffusion.to_data(v, x_t, alpha, sigma, "v_prediction"), data)
    torch.testing.assert_close(diffusion.to_noise(noise, x_t, alpha, sigma, "epsilon"), noise, rtol=0, atol=0)


def test_epsilon_at_pure_noise_converts_with_the_original_coefficients_on_request():
    schedule = diffusion.scaled_linear().with_pure_noise_end()
    _, noise = ends(1, dtype=torch.float32)
    alpha, sigma = schedule.at([999], original=True)
    assert alpha.item() == pytest.approx(1 / 14.65, rel=1e-3)
    error = torch.full_like(noise, 0.01)
    data = diffusion.to_data(noise + error, noise, alpha, sigma, "epsilon")
    exact = diffusion.to_data(noise, noise, alpha, sigma, "epsilon")
    torch.testing.assert_close(data - exact, torch.full_like(noise, -0.01 * 14.61), rtol=1e-3, atol=1e-5)


def test_sample_without_noise_is_refused_where_noise_or_a_score_is_asked_for():
    data, noise = ends(1)
    with pytest.raises(ValueError, match="sigma = 0"):
        diffusion.to_noise(data, data, 1.0, 0.0, "sample")
    with pytest.raises(ValueError, match=r"sigma = 0.*score"):
        diffusion.to_score(noise, data, 1.0, 0.0, "epsilon")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_converted_in_float32(dtype):
    data, noise = ends(2, dtype=dtype)
    alpha, sigma = diffusion.scaled_linear().at([700, 900])
    x_t, v = noise, data
    result = diffusion.to_data(v, x_t, alpha, sigma, "v_prediction")
    assert result.dtype == dtype
    exact = diffusion.to_data(v.double(), x_t.double(), alpha, sigma, "v_prediction")
    rounding = torch.finfo(dtype).eps / 2 * exact.abs()  # one rounding of the result; float32 arithmetic adds nothing
    assert ((result.double() - exact).abs() <= 1.01 * rounding).all()


def test_conversion_is_differentiable_and_survives_compile_tracing():
    data, noise = ends(2)
    alpha, sigma = torch.tensor([0.6, 0.8]).double(), torch.tensor([0.8, 0.6]).double()

    def data_of(pred, x_t):
        return diffusion.to_data(pred, x_t, alpha, sigma, "v_prediction")

    assert torch.autograd.gradcheck(data_of, (noise.requires_grad_(), data.requires_grad_()))
    compiled = torch.compile(data_of, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(noise, data), data_of(noise, data), rtol=0, atol=0)


def test_guidance_follows_the_raw_scale_and_commutes_with_conversion():
    uncond, cond = ends(2)
    x_t = ends(2, seed=1)[0]
    alpha, sigma = torch.tensor([0.6, 0.8]).double(), torch.tensor([0.8, 0.6]).double()
    guided = diffusion.guide(uncond, cond, 3.0)
    torch.testing.assert_close(guided, uncond + 3.0 * (cond - uncond))
    assert diffusion.guide(uncond, cond, 1.0) is cond
    per_sample = diffusion.guide(uncond, cond, torch.tensor([1.0, 3.0]).double())
    torch.testing.assert_close(per_sample, torch.stack([cond[0], guided[1]]))
    mu = [diffusion.to_data(p, x_t, alpha, sigma, "epsilon") for p in (uncond, cond, guided)]
    torch.testing.assert_close(diffusion.guide(mu[0], mu[1], 3.0), mu[2])


def test_scaled_linear_is_stable_diffusions_schedule():
    schedule = diffusion.scaled_linear()
    reference = ddim().alphas_cumprod
    torch.testing.assert_close(schedule.alpha, reference.sqrt(), rtol=2e-5, atol=0)
    torch.testing.assert_close(schedule.sigma, (1 - reference).sqrt(), rtol=1e-4, atol=0)
    assert schedule.alpha[999].item() == pytest.approx(0.0683, abs=1e-4)
    assert schedule.sigma[0].item() == pytest.approx(0.00085**0.5, rel=1e-7)  # 1 - alpha^2 in float32: off by 4e-5


def test_zero_terminal_snr_matches_diffusers_and_keeps_the_first_timestep():
    schedule = diffusion.scaled_linear(zero_terminal_snr=True)
    reference = ddim(rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(schedule.alpha, reference.sqrt(), rtol=1e-4, atol=1e-6)
    assert schedule.alpha[0].item() == pytest.approx(diffusion.scaled_linear().alpha[0].item(), abs=1e-7)
    assert schedule.at(999) == (0.0, 1.0)
    assert schedule.at(999, original=True)[0].item() == pytest.approx(0.0683, abs=1e-4)


def test_pure_noise_end_moves_only_the_last_timestep():
    plain = diffusion.scaled_linear()
    schedule = plain.with_pure_noise_end()
    assert torch.equal(schedule.alpha[:-1], plain.alpha[:-1])
    assert schedule.at(999) == (0.0, 1.0)
    assert torch.equal(schedule.original_alpha, plain.alpha)
    assert plain.alpha[999] > 0


def test_under_zero_terminal_snr_the_last_sample_does_not_depend_on_the_data():
    data, noise = ends(2, dtype=torch.float32)
    coefficients = diffusion.scaled_linear(zero_terminal_snr=True).at([999, 999])
    assert torch.equal(diffusion.add_noise(data, noise, *coefficients), noise)
    assert torch.equal(diffusion.add_noise(1000 * data, noise, *coefficients), noise)


@pytest.mark.parametrize("options", [{}, {"rescale_betas_zero_snr": True}, {"beta_schedule": "squaredcos_cap_v2"}])
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, EulerDiscreteScheduler])
def test_schedule_is_read_from_any_scheduler_with_alphas_cumprod(scheduler_class, options):
    scheduler = scheduler_class(**{**STABLE_DIFFUSION, **options})
    scheduler.set_timesteps(7)  # the schedule must not depend on the sampler's momentary timesteps
    schedule = diffusion.from_scheduler(scheduler)
    torch.testing.assert_close(schedule.alpha, scheduler.alphas_cumprod.sqrt(), rtol=1e-6, atol=3e-4)
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(1000))
    if options.get("rescale_betas_zero_snr"):
        assert schedule.at(999) == (0.0, 1.0)
        torch.testing.assert_close(schedule.original_alpha, diffusion.scaled_linear().alpha, rtol=2e-5, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_schedule_is_that_of_diffusers_flow_matching(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = diffusion.from_scheduler(scheduler)
    torch.testing.assert_close(schedule.sigma, scheduler.sigmas.flip(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.timesteps, scheduler.timesteps.flip(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.alpha + schedule.sigma, torch.ones(1000))
    assert schedule.at(999) == (0.0, 1.0)
    assert diffusion.prediction_type_of(scheduler) == "flow_prediction"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_is_read_from_the_scheduler(prediction_type):
    assert diffusion.prediction_type_of(ddim(prediction_type=prediction_type)) == prediction_type


@pytest.mark.parametrize("zero_snr", [False, True])
def test_add_noise_and_velocity_agree_with_ddim(zero_snr):
    scheduler = ddim(rescale_betas_zero_snr=zero_snr)
    t = torch.tensor([0, 17, 640, 999])
    data, noise = ends(4, dtype=torch.float32)
    alpha, sigma = diffusion.from_scheduler(scheduler).at(t)
    torch.testing.assert_close(diffusion.add_noise(data, noise, alpha, sigma), scheduler.add_noise(data, noise, t))
    torch.testing.assert_close(
        diffusion.training_target(data, noise, alpha, sigma, "v_prediction"), scheduler.get_velocity(data, noise, t)
    )


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),  # epsilon with zero terminal SNR has no first step: an error, tested above
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", False), ("sample", True)],
)
def test_ddim_step_agrees_with_diffusers_along_a_whole_trajectory(prediction_type, zero_snr):
    scheduler = ddim(prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing")
    scheduler.set_timesteps(8)
    schedule = diffusion.from_scheduler(scheduler)
    timesteps = diffusion.inference_timesteps(8, "trailing").tolist()
    assert timesteps == scheduler.timesteps.tolist()
    x_t, pred = ends(2, dtype=torch.float32)
    for t, t_next in zip(timesteps, [*timesteps[1:], None]):
        next_alpha, next_sigma = (1.0, 0.0) if t_next is None else schedule.at(t_next)
        ours = diffusion.ddim_step(pred, x_t, *schedule.at(t), next_alpha, next_sigma, prediction_type)
        theirs = scheduler.step(pred, t, x_t)
        torch.testing.assert_close(
            diffusion.to_data(pred, x_t, *schedule.at(t), prediction_type),
            theirs.pred_original_sample,
            rtol=1e-4,
            atol=1e-5,
        )
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-4, atol=1e-5)
        x_t, pred = ours, torch.tanh(ours)


@pytest.mark.parametrize("spacing", diffusion.TIMESTEP_SPACINGS)
def test_timestep_tables_equal_diffusers_for_every_number_of_steps(spacing):
    scheduler = ddim(timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0)
    for steps in [*range(1, 130), 250, 333, 500, 999, 1000]:
        scheduler.set_timesteps(steps)
        table = diffusion.inference_timesteps(steps, spacing, steps_offset=scheduler.config.steps_offset)
        # diffusers' trailing table sometimes ends in a surplus t = -1, which no network was trained at.
        assert table.tolist() == [t for t in scheduler.timesteps.tolist() if t >= 0]
        assert len(table) == steps


def test_one_step_starts_where_the_spacing_says():
    assert diffusion.inference_timesteps(1, "trailing").tolist() == [999]
    assert diffusion.inference_timesteps(1, "leading", steps_offset=1).tolist() == [1]
    assert diffusion.inference_timesteps(4, "trailing").tolist() == [999, 749, 499, 249]


def test_unknown_names_are_refused_with_the_known_ones():
    x = torch.zeros(1, 2)
    every_type = ".*".join(PREDICTION_TYPES)
    for call in (
        lambda: diffusion.to_data(x, x, 1.0, 1.0, "eps"),
        lambda: diffusion.convert(x, x, 1.0, 1.0, "epsilon", "velocity"),
        lambda: diffusion.training_target(x, x, 1.0, 1.0, "v"),
    ):
        with pytest.raises(ValueError, match=every_type):
            call()
    with pytest.raises(ValueError, match=r"leading, trailing, linspace.*'karras'"):
        diffusion.inference_timesteps(4, "karras")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: diffusion.to_data(x, x[:1], 1.0, 1.0), ValueError, r"pred and x_t.*\(2, 3\) and \(1, 3\)"),
        (lambda x: diffusion.to_data(x, x, torch.ones(3), 1.0), ValueError, r"alpha must be.*\(2,\).*\(3,\)"),
        (lambda x: diffusion.add_noise(x, x, 1.0, torch.ones(2, 1)), ValueError, r"sigma must be.*\(2, 1\)"),
        (lambda x: diffusion.add_noise(x.long(), x, 1.0, 1.0), ValueError, "data must be floating point.*int64"),
        (lambda x: diffusion.add_noise(x, 3.0, 1.0, 1.0), TypeError, "noise must be a tensor; got float"),
        (lambda x: diffusion.guide(x, x[:, :1], 2.0), ValueError, "pred_uncond and pred_cond"),
        (lambda x: diffusion.scaled_linear().at(1000), ValueError, r"0\.\.999; got 1000"),
        (lambda x: diffusion.scaled_linear().at(torch.tensor([3, -1])), ValueError, r"0\.\.999; got -1\.\.3"),
        (lambda x: diffusion.scaled_linear().at(torch.tensor([0.5])), ValueError, "integer index.*float32"),
        (lambda x: diffusion.scaled_linear().at(torch.tensor([1], device="meta")), ValueError, "t is on meta"),
        (lambda x: diffusion.scaled_linear(0.1, 0.01), ValueError, "beta_start and beta_end"),
        (lambda x: diffusion.scaled_linear(num_train_timesteps=1), ValueError, "num_train_timesteps must be 2 or more"),
        (lambda x: diffusion.scaled_linear().to(dtype=torch.float16), ValueError, "float32 or torch.float64"),
        (lambda x: diffusion.flow().with_zero_terminal_snr(), ValueError, "variance-preserving"),
        (lambda x: diffusion.flow(shift=0), ValueError, "shift must be positive; got 0"),
        (lambda x: diffusion.inference_timesteps(0, "trailing"), ValueError, r"num_steps must be in 1\.\.1000; got 0"),
        (lambda x: diffusion.inference_timesteps(1.5, "trailing"), TypeError, "num_steps must be an integer"),
    ],
)
def test_bad_input_names_the_argument_the_value_and_the_need(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3))


def test_a_scheduler_without_a_known_schedule_is_refused():
    class Mystery:
        config = {}  # noqa: RUF012

    with pytest.raises(ValueError, match="Mystery has neither"):
        diffusion.from_scheduler(Mystery())
