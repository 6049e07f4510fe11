"""A variance-preserving network as a flow on the straight path: its points, its velocity, its Euler steps."""

import math
from itertools import pairwise

import pytest
import torch
from fastdistill.training import Condition, StraightPath, flow_straightness
from fastdistill.training.flow import flow_path
from fastdistill.training.networks import conversion_point
from fastdistill.training.solvers import solve
from torch import nn

from fastdistill import diffusion

CONDITION = Condition(torch.zeros(1, 1, 1, dtype=torch.float64))


def schedule(zero_terminal_snr, prediction_type="epsilon"):
    plain = diffusion.scaled_linear(dtype=torch.float64)
    return plain.with_zero_terminal_snr() if zero_terminal_snr else plain


class Gaussian(nn.Module):
    """The exact denoiser of N(mean, std^2) on any schedule, at any time between its timesteps; records its times."""

    def __init__(self, schedule, prediction_type, mean=0.7, std=0.5):
        super().__init__()
        self.schedule, self.prediction_type, self.mean, self.std = schedule, prediction_type, mean, std
        self.times = []

    def forward(self, x_t, t, encoder_hidden_states, return_dict):
        self.times.append(t)
        alpha, sigma = self.schedule.at(t.long())
        a, s = alpha[:, None], sigma[:, None]
        mu = self.mean + a * self.std**2 / (a**2 * self.std**2 + s**2) * (x_t - a * self.mean)
        if self.prediction_type == "epsilon":  # of the denoiser's own Gaussian, which exists at alpha = 0 too
            return (s / (a**2 * self.std**2 + s**2) * (x_t - a * self.mean),)
        return (diffusion.convert(mu, x_t, alpha, sigma, "sample", self.prediction_type),)


def euler(path, network, noise, times):
    x = noise
    for t, following in pairwise(times):
        many = torch.full((len(x),), t, dtype=torch.float64)
        x = x + (following - t) * path.velocity(network, x, many, CONDITION.expand(len(x)))
    return x


def trailing_times(schedule, steps):
    """t of the trailing timesteps: pure noise first, data behind the last."""
    alpha, sigma = schedule.at(diffusion.inference_timesteps(steps, "trailing"))
    return [0.0, *(alpha / (alpha + sigma))[1:].tolist(), 1.0]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_euler_steps_of_the_teachers_flow_are_ddim_steps(prediction_type, steps):
    table = schedule(zero_terminal_snr=True)
    network = Gaussian(table, prediction_type)
    noise = torch.randn(6, 2, dtype=torch.float64)
    flowed = euler(StraightPath(table, prediction_type), network, noise, trailing_times(table, steps))
    visited = torch.stack(network.times)[:, 0].tolist()
    assert visited == diffusion.inference_timesteps(steps, "trailing").tolist()
    solved = solve(network, noise, CONDITION.expand(6), table, prediction_type, steps=steps)
    torch.testing.assert_close(flowed, solved, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zero_terminal_snr", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_one_euler_step_from_noise_is_the_one_step_of_every_sampler(prediction_type, zero_terminal_snr):
    table = schedule(zero_terminal_snr)
    network = Gaussian(table, prediction_type)
    noise = torch.randn(5, 2, dtype=torch.float64)
    one_step = euler(StraightPath(table, prediction_type), network, noise, [0.0, 1.0])
    pred = network(noise, torch.full((5,), 999), None, False)[0]
    expected = diffusion.to_data(pred, noise, *conversion_point(table, 999, prediction_type), prediction_type)
    torch.testing.assert_close(one_step, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zero_terminal_snr", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_within_the_schedule_the_velocity_is_the_difference_of_the_ends_that_the_network_sees(
    prediction_type, zero_terminal_snr
):
    table = schedule(zero_terminal_snr)
    path, network = StraightPath(table, prediction_type), Gaussian(table, prediction_type)
    index = torch.tensor([3, 200, 500, 900, 990])
    alpha, sigma = table.at(index)
    x_vp = torch.randn(5, 2, dtype=torch.float64)
    x_t, share = diffusion.to_straight_path(x_vp, alpha, sigma)
    velocity = path.velocity(network, x_t, 1 - share, CONDITION.expand(5))
    pred = network(x_vp, index, None, False)[0]
    of_x = (pred, x_vp, alpha, sigma, prediction_type)
    torch.testing.assert_close(velocity, diffusion.to_data(*of_x) - diffusion.to_noise(*of_x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_beyond_a_schedule_that_ends_before_pure_noise_the_velocity_leads_to_the_data_read_at_its_end(prediction_type):
    table = schedule(zero_terminal_snr=False)
    network = Gaussian(table, prediction_type)
    x_t, t = torch.randn(2, 2, dtype=torch.float64), torch.tensor([0.0, 0.03], dtype=torch.float64)
    velocity = StraightPath(table, prediction_type).velocity(network, x_t, t, CONDITION.expand(2))
    assert network.times[0].tolist() == [999, 999]
    x_vp = x_t / torch.hypot(t, 1 - t)[:, None]
    pred = network(x_vp, torch.tensor([999, 999]), None, False)[0]
    data = diffusion.to_data(pred, x_vp, *table.at(999), prediction_type)
    torch.testing.assert_close(x_t + (1 - t)[:, None] * velocity, data, rtol=1e-9, atol=1e-9)


def test_times_are_exact_at_the_timesteps_and_between_them_elsewhere():
    table = schedule(zero_terminal_snr=True)
    path = StraightPath(table, "v_prediction")
    share = table.sigma / (table.alpha + table.sigma)
    assert torch.equal(path.timestep(share), torch.arange(1000.0))
    between = path.timestep((share[1:] + share[:-1]) / 2)
    torch.testing.assert_close(between, torch.arange(999) + 0.5)
    assert path.timestep(torch.tensor([0.0, 1.0])).tolist() == [0, 999]
    assert path.start == 999


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "instaflow"])
def test_a_flow_network_sees_the_straight_path_itself_at_a_thousand_times_the_share_of_noise(prediction_type):
    seen = []

    def network(x, t, encoder_hidden_states, return_dict):
        seen.append((x, t))
        return (torch.full_like(x, 2.0),)

    path = StraightPath(diffusion.flow(), prediction_type)
    x_t = torch.randn(3, 2, dtype=torch.float64)
    velocity = path.velocity(network, x_t, torch.tensor([0.0, 0.25, 0.9]), CONDITION.expand(3))
    assert torch.equal(seen[0][0], x_t)
    torch.testing.assert_close(seen[0][1], torch.tensor([1000.0, 750.0, 100.0]), rtol=0, atol=1e-3)
    sign = {"flow_prediction": -1, "instaflow": 1}[prediction_type]  # noise - data, data - noise
    torch.testing.assert_close(velocity, sign * torch.full_like(x_t, 2.0))


def test_a_flow_for_diffusers_is_read_at_its_first_sigma():
    path = flow_path()
    assert path.start == 999
    noise = torch.randn(4, 2)

    def network(x, t, encoder_hidden_states, return_dict):
        assert t.tolist() == [999] * 4
        return (torch.ones_like(x),)

    velocity = path.velocity(network, noise, torch.zeros(4), Condition(torch.zeros(4, 1, 1)))
    torch.testing.assert_close(noise + velocity, noise - 0.999)


def test_guidance_of_the_velocity_is_that_of_the_prediction():
    table = schedule(zero_terminal_snr=True)

    def network(x, t, encoder_hidden_states, return_dict):
        return (x * encoder_hidden_states[:, 0],)

    path = StraightPath(table, "v_prediction")
    x_t, t = torch.randn(4, 1, dtype=torch.float64), torch.tensor([0.0, 0.2, 0.5, 0.8], dtype=torch.float64)
    text, empty = (Condition(torch.full((n, 1, 1), value, dtype=torch.float64)) for n, value in ((4, 1.0), (1, 3.0)))
    conditional, unconditional = (path.velocity(network, x_t, t, c) for c in (text, empty.expand(4)))
    guided = path.velocity(network, x_t, t, text, 1.5, empty)
    torch.testing.assert_close(guided, 1.5 * conditional - 0.5 * unconditional)


def test_straightness_of_the_exact_flow_between_unit_gaussians_is_2_minus_half_pi():
    class Exact(nn.Module):  # of N(0, 1) every VP marginal is N(0, 1), and v is 0
        def forward(self, x_t, t, encoder_hidden_states, return_dict):
            return (torch.zeros_like(x_t),)

    path = StraightPath(schedule(zero_terminal_snr=True), "v_prediction")
    condition = Condition(torch.zeros(3, 1, 1))
    measured = flow_straightness(Exact(), path, condition, (400,), samples=100, steps=400, batch_size=30)
    assert measured == pytest.approx(2 - math.pi / 2, abs=0.02)
