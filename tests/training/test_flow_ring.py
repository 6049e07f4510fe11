"""Reflow and distillation on the ring: eight modes from one step, over a teacher known in closed form.

It shows that the algorithm is wired correctly. It cannot rank methods or settings: all land within seed noise there.
"""

import pytest
import torch
from fastdistill.training import (
    FlowDistillation,
    PromptData,
    Reflow,
    RoleConfig,
    StraightPath,
    Trainer,
    TrainerConfig,
    flow_straightness,
    make_pairs,
)
from torch import nn

from fastdistill import diffusion

from .ring import CONDITION, PREDICTION_TYPE, SCHEDULE, SHAPE, RingTeacher, StudentMLP, ring_scores

PATH = StraightPath(SCHEDULE, PREDICTION_TYPE)
SHARES = SCHEDULE.sigma.double() / (SCHEDULE.alpha.double() + SCHEDULE.sigma.double())


class ContinuousRing(RingTeacher):
    """The ring's teacher at the times between its timesteps too."""

    def forward(self, x_t, t, encoder_hidden_states=None, return_dict=False):
        index = t.double().clamp(0, len(SHARES) - 1)
        low = index.long().clamp(max=len(SHARES) - 2)
        share = torch.lerp(SHARES[low], SHARES[low + 1], index - low).float()
        length = torch.hypot(share, 1 - share)
        alpha, sigma = (1 - share) / length, share / length
        mu = self.denoise(x_t, alpha[:, None], sigma[:, None])
        return (diffusion.convert(mu, x_t, alpha, sigma, "sample", self.prediction_type),)


def train(method, pairs, updates, learning_rate=1e-2):
    config = TrainerConfig(updates=updates, batch_size=256, ema_decay=0.99, report_every=updates)
    roles = {"student": RoleConfig(learning_rate, weight_decay=0.0, decay=0.9)}
    return Trainer(method, PromptData(CONDITION, SHAPE, pairs), config, roles).run().student


def pairs_of(network, count, seed, steps=25):
    options = {"count": count, "sample_shape": SHAPE, "steps": steps, "seed": seed, "batch_size": count}
    return make_pairs(network, CONDITION, SCHEDULE, PREDICTION_TYPE, **options)


def measured(network):
    return flow_straightness(network, PATH, CONDITION, SHAPE, samples=2000, batch_size=2000)


def one_step(network, count=4000):
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return noise + PATH.velocity(network, noise, torch.zeros(count), CONDITION.expand(count))


def distilled(updates, pairs, seed=0):
    """Straightness before and after one reflow, and the samples of its one-step student."""
    teacher = ContinuousRing()
    student: nn.Module = StudentMLP(seed=seed)
    flow = train(Reflow(student, PATH), pairs_of(teacher, pairs, seed + 1, steps=50), updates)
    student = train(FlowDistillation(flow, PATH), pairs_of(flow, pairs, seed + 2), updates)
    return measured(teacher), measured(flow), one_step(student)


def test_after_a_quick_reflow_the_flow_is_straight_and_one_step_draws_all_eight_modes():
    before, after, samples = distilled(updates=900, pairs=4000)
    assert before == pytest.approx(0.52, abs=0.03)
    assert after < 0.01
    distance, modes, share = ring_scores(samples)
    assert distance < 0.15
    assert modes == 8
    assert share > 0.04


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_after_a_full_reflow_the_flow_is_as_good_as_straight(seed):
    before, after, samples = distilled(updates=8000, pairs=20000, seed=10 * seed)
    assert before == pytest.approx(0.52, abs=0.03)
    assert after < 0.002
    distance, modes, share = ring_scores(samples)
    assert distance < 0.1
    assert modes == 8
    assert share > 0.08
