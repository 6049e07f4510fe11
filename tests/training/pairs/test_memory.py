"""The teacher's ODE against the exact flow of a Gaussian."""

import pytest
import torch
from fastdistill.training import Condition, make_pairs
from fastdistill.training.networks import conversion_point, predict_guided

from fastdistill import diffusion

from ..toys import CONDITIONS, TARGET_MEAN, TARGET_STD, GaussianNetwork, gaussian_teacher


def exact_first_step(network):
    """The closed-form denoiser everywhere, the last timestep included: there x0 is the mean."""
    with torch.no_grad():
        network.gain.zero_()
        network.bias.copy_(network.mean)
    return network


def test_the_ode_of_a_gaussian_carries_noise_to_mean_plus_std_times_noise():
    teacher, schedule = gaussian_teacher()
    exact_first_step(teacher)
    pairs = make_pairs(teacher, CONDITIONS, schedule, "sample", count=50, sample_shape=(2,), steps=500)
    expected = torch.tensor(TARGET_MEAN) + torch.tensor(TARGET_STD) * pairs.noise
    torch.testing.assert_close(pairs.sample, expected, rtol=0, atol=0.03)


def test_the_pairs_depend_on_the_seed_and_not_on_the_batch_size():
    teacher, schedule = gaussian_teacher()
    conditions = Condition(torch.zeros(5, 1, 1))
    options = {"count": 20, "sample_shape": (2,), "steps": 4}
    whole = make_pairs(teacher, conditions, schedule, "sample", **options)
    parts = make_pairs(teacher, conditions, schedule, "sample", batch_size=7, **options)
    other = make_pairs(teacher, conditions, schedule, "sample", seed=1, **options)
    assert torch.equal(whole.noise, parts.noise)
    assert torch.equal(whole.condition, parts.condition)
    torch.testing.assert_close(whole.sample, parts.sample)
    assert not torch.equal(whole.noise, other.noise)
    assert set(whole.condition.tolist()) == set(range(5))


def test_guidance_mixes_the_two_predictions_with_the_raw_scale():
    class Echo(torch.nn.Module):
        def forward(self, x_t, t, encoder_hidden_states, return_dict):
            return (x_t * encoder_hidden_states[:, 0],)

    x, t = torch.ones(3, 1), torch.zeros(3, dtype=torch.long)
    condition, empty = Condition(torch.full((3, 1, 1), 5.0)), Condition(torch.full((1, 1, 1), 2.0))
    assert torch.equal(predict_guided(Echo(), x, t, condition, 3.0, empty), torch.full((3, 1), 2.0 + 3 * (5.0 - 2.0)))
    with pytest.raises(ValueError, match=r"guidance_scale 3\.0 needs"):
        predict_guided(Echo(), x, t, condition, 3.0)


def test_epsilon_at_pure_noise_is_read_with_the_original_coefficients():
    schedule = diffusion.scaled_linear(zero_terminal_snr=True)
    assert conversion_point(schedule, 999, "epsilon") == schedule.at(999, original=True)
    assert conversion_point(schedule, 999, "v_prediction") == (0.0, 1.0)
    assert conversion_point(schedule, 500, "epsilon") == schedule.at(500)


def test_an_epsilon_teacher_with_zero_terminal_snr_gives_finite_pairs():
    class ZeroNoise(GaussianNetwork):
        def forward(self, x_t, *args, **kwargs):
            return (0.1 * x_t,)

    schedule = diffusion.scaled_linear(zero_terminal_snr=True)
    network = ZeroNoise((0.0,), (1.0,), (0.0,), (0.0,), schedule)
    pairs = make_pairs(network, CONDITIONS, schedule, "epsilon", count=4, sample_shape=(1,), steps=3)
    assert pairs.sample.isfinite().all()
