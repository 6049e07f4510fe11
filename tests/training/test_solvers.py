"""The named solvers against the closed-form flow of a Gaussian, and against the DDIM steps of plain diffusers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from fastdistill.training import Condition
from fastdistill.training.solvers import SOLVERS, network_calls, solve

from fastdistill import diffusion
from fastdistill.diffusion import Schedule

from .toys import CONDITIONS, TARGET_MEAN, TARGET_STD

MEAN, STD = (torch.tensor(value, dtype=torch.float64) for value in (TARGET_MEAN, TARGET_STD))
STRAIGHT = diffusion.flow(dtype=torch.float64)
STABLE_DIFFUSION = diffusion.scaled_linear(zero_terminal_snr=True, dtype=torch.float64)


class ExactNetwork(torch.nn.Module):
    """What an ideal network of any prediction type says of N(MEAN, STD^2), on any schedule."""

    def __init__(self, schedule, prediction_type):
        super().__init__()
        self.schedule, self.prediction_type, self.calls = schedule, prediction_type, 0

    def forward(self, x_t, t, encoder_hidden_states, return_dict):
        self.calls += 1
        alpha, sigma = self.schedule.at(torch.searchsorted(self.schedule.timesteps, t[0].to(self.schedule.timesteps)))
        data = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)
        a, b = diffusion.prediction_coefficients(self.prediction_type, alpha, sigma)
        return (a * data + b * (x_t - alpha * data) / sigma,)


def noise_of(count=200, dtype=torch.float64):
    return torch.randn(count, 2, dtype=dtype, generator=torch.Generator().manual_seed(3))


def conditions_of(count, dtype=torch.float64):
    return Condition(torch.zeros(count, 1, 1, dtype=dtype))


def error(solver, steps, schedule, prediction_type="v_prediction", start=None):
    """Root mean square distance to where the exact flow carries the same noise."""
    noise = noise_of()
    network = ExactNetwork(schedule, prediction_type)
    x = noise if start is None else start(noise)
    found = solve(network, x, conditions_of(len(x)), schedule, prediction_type, solver=solver, steps=steps)
    return (found - (MEAN + STD * noise)).square().mean().sqrt().item()


def order(solver, schedule, few, many, **options):
    return math.log(error(solver, few, schedule, **options) / error(solver, many, schedule, **options)) / math.log(
        many / few
    )


@pytest.mark.parametrize(("solver", "expected"), [("euler", 1), ("heun", 2)])
def test_euler_is_of_first_and_heun_of_second_order_on_the_straight_path(solver, expected):
    assert order(solver, STRAIGHT, 50, 200) == pytest.approx(expected, abs=0.05)


def test_dpmpp_is_of_second_order_in_the_log_of_the_signal_to_noise_ratio():
    ratio = torch.linspace(9, -6, 2000, dtype=torch.float64).exp()  # alpha / sigma
    sigma = 1 / (1 + ratio.square()).sqrt()
    schedule = Schedule(ratio * sigma, sigma, torch.arange(2000), ratio * sigma, sigma)
    alpha, sigma = schedule.at(1999)

    def exact_start(noise):
        return alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * noise

    assert order("dpmpp", schedule, 100, 400, start=exact_start) == pytest.approx(2, abs=0.1)
    assert order("euler", schedule, 100, 400, start=exact_start) == pytest.approx(1, abs=0.1)


def test_from_pure_noise_dpmpp_converges_as_log_n_over_n_squared():
    # The steps next to the ends stay as wide in the log of the ratio, however many there are.
    constants = [error("dpmpp", n, STRAIGHT) * n**2 / math.log(n) for n in (100, 200, 500)]
    assert max(constants) / min(constants) < 1.05


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction", "instaflow"])
@pytest.mark.parametrize("schedule", [STRAIGHT, STABLE_DIFFUSION], ids=["straight", "stable-diffusion"])
def test_every_prediction_type_gives_the_same_samples_from_alpha_zero(schedule, prediction_type, solver):
    assert schedule.alpha[-1] == 0
    assert error(solver, 20, schedule, prediction_type) == pytest.approx(error(solver, 20, schedule, "sample"))


def test_the_second_order_solvers_halve_the_error_of_euler_on_stable_diffusions_schedule():
    errors = {solver: error(solver, 25, STABLE_DIFFUSION) for solver in SOLVERS}
    assert errors["heun"] < 0.6 * errors["euler"]
    assert errors["dpmpp"] < 0.6 * errors["euler"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_epsilon_network_at_pure_noise_starts_from_the_original_coefficients(solver):
    # The exact network of the schedule as it was, whose last timestep is not quite noise: no NaN, and the same numbers.
    plain = diffusion.scaled_linear(dtype=torch.float64)
    noisy_end = plain.with_pure_noise_end()
    network, noise = ExactNetwork(plain, "epsilon"), noise_of(8)
    options = {"solver": solver, "steps": 10}
    condition = conditions_of(8)
    expected = solve(network, noise, condition, plain, "epsilon", **options)
    assert torch.equal(solve(network, noise, condition, noisy_end, "epsilon", **options), expected)
    assert expected.isfinite().all()


def test_an_epsilon_network_on_a_path_that_was_always_pure_noise_is_refused_before_it_is_called():
    network = ExactNetwork(STRAIGHT, "epsilon")
    with pytest.raises(ValueError, match="epsilon"):
        solve(network, noise_of(2), conditions_of(2), STRAIGHT, "epsilon")
    assert network.calls == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_single_step_is_the_networks_own_idea_of_the_data(solver):
    found = solve(
        ExactNetwork(STABLE_DIFFUSION, "v_prediction"),
        noise_of(4),
        conditions_of(4),
        STABLE_DIFFUSION,
        "v_prediction",
        solver=solver,
        steps=1,
    )
    torch.testing.assert_close(found, MEAN.expand(4, 2))


def test_euler_is_the_ddim_step_bit_for_bit():
    schedule = diffusion.scaled_linear(zero_terminal_snr=True)
    network, x = ExactNetwork(schedule, "v_prediction"), noise_of(8, torch.float32)
    found = solve(network, x, conditions_of(8, torch.float32), schedule, "v_prediction", steps=10)
    timesteps = diffusion.inference_timesteps(10, "trailing").tolist()
    for t, following in zip(timesteps, [*timesteps[1:], None]):
        pred = network(x, torch.full((8,), t), None, False)[0].float()
        point, end = schedule.at(t), (1.0, 0.0) if following is None else schedule.at(following)
        x = diffusion.ddim_step(pred, x, *point, *end, "v_prediction")
    assert torch.equal(found, x)


def test_euler_equals_the_ddim_scheduler_of_diffusers():
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    schedule = diffusion.from_scheduler(scheduler)
    network, x = ExactNetwork(schedule, "v_prediction"), noise_of(8)
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(8), None, False)[0], t, x).prev_sample
    found = solve(network, noise_of(8), conditions_of(8), schedule, "v_prediction", steps=10)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 7), ("heun", 13), ("dpmpp", 7)])
def test_the_network_is_called_as_often_as_the_solver_says(solver, calls):
    network = ExactNetwork(STRAIGHT, "flow_prediction")
    solve(network, noise_of(2), conditions_of(2), STRAIGHT, "flow_prediction", solver=solver, steps=7)
    assert network.calls == network_calls(solver, 7) == calls


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_network_in_half_precision_leaves_the_solvers_arithmetic_in_float32(solver):
    class Half(torch.nn.Module):
        def forward(self, x_t, t, encoder_hidden_states, return_dict):
            assert x_t.dtype == encoder_hidden_states.dtype == torch.bfloat16
            return (torch.zeros_like(x_t),)  # a velocity of 0: in straight coordinates nothing moves

    noise = noise_of(4, torch.float32)
    schedule = diffusion.scaled_linear(zero_terminal_snr=True)
    found = solve(Half(), noise, conditions_of(4, torch.bfloat16), schedule, "flow_prediction", solver=solver, steps=10)
    torch.testing.assert_close(found, noise, rtol=1e-5, atol=1e-5)


def test_an_unknown_solver_and_impossible_steps_are_named():
    network = ExactNetwork(STRAIGHT, "sample")
    with pytest.raises(ValueError, match=r"solver must be one of euler, heun, dpmpp; got 'ddim'"):
        solve(network, noise_of(1), CONDITIONS, STRAIGHT, "sample", solver="ddim")
    with pytest.raises(ValueError, match=r"in 1\.\.1000; got 0"):
        solve(network, noise_of(1), CONDITIONS, STRAIGHT, "sample", steps=0)
