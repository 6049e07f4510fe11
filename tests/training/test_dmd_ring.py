"""DMD and DMD2 on the ring: that they are wired correctly. It cannot rank them, nor say which of their terms matter."""

import pytest
import torch
from fastdistill.training import DMD, DMD2, DMD2Config, DMDConfig, Draws, FakeScore, LatentData, PromptData, Trainer
from fastdistill.training.config import role_configs
from fastdistill.training.settings import changed
from torch import nn

from fastdistill import diffusion

from .ring import CONDITION, PREDICTION_TYPE, SCHEDULE, SHAPE, RingTeacher, StudentMLP, ring_samples, ring_scores

ROLES = {
    "student": {"learning_rate": 1e-3, "weight_decay": 0.0},
    "fake_score": {"learning_rate": 2e-3, "weight_decay": 0.0},
    "trainer": {"ema_decay": 0.99},
}


class ScoreMLP(StudentMLP):
    @property
    def mid_block(self):
        return self.layers[1]


def dmd_samples(updates, batch_size, seed=0):
    config = changed(DMDConfig(regression_weight=0), **ROLES)
    config = changed(config, trainer={"updates": updates, "batch_size": batch_size, "seed": seed})
    networks = {"student": StudentMLP(seed=seed), "fake_score": StudentMLP(seed=100 + seed)}
    method = DMD(RingTeacher(), SCHEDULE, PREDICTION_TYPE, config, **networks)
    method.student = Trainer(method, PromptData(CONDITION, SHAPE), config.trainer, role_configs(config)).run().student
    draws = Draws(7, batch_size=4000)
    with torch.no_grad():
        return method.generate(draws.randn(*SHAPE), CONDITION.expand(4000))


def taught(updates=1500, batch_size=256):
    """A network that has learned the teacher's predictions: what a copy of a real teacher is."""
    network, teacher = StudentMLP(), RingTeacher()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, updates)
    for update in range(updates):
        draws = Draws("taught", update, batch_size=batch_size)
        t = draws.randint(0, len(SCHEDULE))
        x_t = diffusion.add_noise(ring_samples(batch_size, seed=update), draws.randn(*SHAPE), *SCHEDULE.at(t))
        loss = (network(x_t, t)[0] - teacher(x_t, t)[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def dmd2_samples(updates, batch_size, seed=0, critic_ratio=3, student_steps=(999,), start=None, **settings):
    config = changed(DMD2Config(critic_ratio=critic_ratio, student_steps=student_steps), **ROLES)
    config = changed(config, **settings)
    config = changed(config, trainer={"updates": updates, "batch_size": batch_size, "seed": seed})
    student, score = StudentMLP(seed=seed), ScoreMLP(seed=100 + seed)
    if start is not None:
        student.load_state_dict(start.state_dict())
        score.load_state_dict(start.state_dict())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fake_score = FakeScore(score, nn.Sequential(nn.SiLU(), nn.Linear(128, 1)))
    method = DMD2(RingTeacher(), SCHEDULE, PREDICTION_TYPE, config, student=student, fake_score=fake_score)
    data = LatentData(ring_samples(4000, seed=5), CONDITION, torch.zeros(4000, 1, dtype=torch.long))
    method.student = Trainer(method, data, config.trainer, role_configs(config)).run().student
    draws = Draws(7, batch_size=4000)
    with torch.no_grad():
        return method.generate_in_steps(draws.randn(*SHAPE), CONDITION.expand(4000), draws)


@pytest.mark.parametrize("samples", [dmd_samples, dmd2_samples])
def test_one_step_finds_every_mode_of_the_ring(samples):
    distance, modes, _ = ring_scores(samples(updates=300, batch_size=192))
    assert distance < 0.25  # the teacher's own one step: 0.95
    assert modes == 8


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("samples", [dmd_samples, dmd2_samples])
def test_a_full_run_comes_close_to_the_ring(samples, seed):
    distance, modes, share = ring_scores(samples(updates=1000, batch_size=256, seed=seed))
    assert distance < 0.15
    assert modes == 8
    assert share > 0.04


@pytest.mark.long
def test_the_gan_alone_finds_the_ring_too():
    weights = {"distribution_weight": 0.0, "gan_weight": 1.0, "critic_gan_weight": 1.0}
    distance, modes, _ = ring_scores(dmd2_samples(updates=600, batch_size=256, **weights))
    assert distance < 0.25
    assert modes == 8


@pytest.mark.long
def test_a_student_of_four_steps_that_starts_as_the_teacher_finds_the_ring_by_backward_simulation():
    """All steps share one fake score: from random weights the mixture of them is matched, and the last loses modes."""
    samples = dmd2_samples(600, 256, critic_ratio=5, student_steps=(999, 749, 499, 249), start=taught())
    distance, modes, share = ring_scores(samples)
    assert distance < 0.25
    assert modes == 8
    assert share > 0.04
