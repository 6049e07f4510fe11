"""The ring toy itself: its closed form, and figures that tell good samples from bad ones."""

import torch

from fastdistill import diffusion

from .ring import SCHEDULE, STD, RingTeacher, ring_centres, ring_samples, ring_scores


def test_the_closed_form_denoiser_is_the_posterior_mean_of_many_draws():
    data = ring_samples(200_000, seed=1).double()
    alpha, sigma = SCHEDULE.at(600)
    x_t = torch.tensor([[0.4, 0.3]], dtype=torch.float64)
    weight = torch.softmax(-(x_t - alpha * data).square().sum(1) / (2 * sigma**2), 0)
    v = RingTeacher()(x_t.float(), torch.tensor([600]))[0]
    mu = diffusion.to_data(v, x_t.float(), alpha, sigma, "v_prediction")
    torch.testing.assert_close(mu.double()[0], weight @ data, rtol=0, atol=5e-3)


def test_at_pure_noise_the_teacher_knows_nothing_but_the_mean():
    noise = torch.randn(100, 2)
    v = RingTeacher()(noise, torch.full((100,), 999))[0]
    torch.testing.assert_close(v, torch.zeros(100, 2), rtol=0, atol=1e-5)


def test_the_teachers_ode_in_many_steps_draws_the_ring_and_in_one_step_a_point():
    teacher, x = RingTeacher(), torch.randn(2000, 2)
    one_step = -teacher(x, torch.full((2000,), 999))[0]
    assert ring_scores(one_step)[0] > 0.9
    steps = diffusion.inference_timesteps(100, "trailing").tolist()
    for t, after in zip(steps, [*steps[1:], None]):
        v = teacher(x, torch.full((2000,), t))[0]
        next_point = SCHEDULE.at(after) if after is not None else (1.0, 0.0)
        x = diffusion.ddim_step(v, x, *SCHEDULE.at(t), *next_point, "v_prediction")
    distance, modes, share = ring_scores(x)
    assert distance < 0.1
    assert modes == 8
    assert share > 0.09


def test_a_missing_mode_and_samples_between_the_modes_are_seen():
    samples = ring_samples(4000, seed=2)
    assert ring_scores(samples)[1:] > (8, 0.09)
    without = samples[(samples - ring_centres()[3]).norm(dim=1) > 5 * STD]
    assert ring_scores(without)[1:] == (7, 0.0)
    assert ring_scores(samples * 0.5)[1] == 0
