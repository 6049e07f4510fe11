"""Clipping, warm-up, decay and the moving average, in updates."""

import pytest
import torch
from fastdistill.training.updates import EMA, RoleUpdater, warm_up_then_decay
from torch import nn


def updater(network, **options):
    defaults = {"learning_rate": 0.1, "betas": (0.0, 0.999), "weight_decay": 0.0, "max_grad_norm": 1.0}
    return RoleUpdater(network, **{**defaults, "schedule": lambda update: 1.0, **options})


def test_the_learning_rate_warms_up_over_updates_and_falls_to_zero_over_the_last_share():
    factor = warm_up_then_decay(100, warm_up=4, decay=0.5)
    assert [factor(n) for n in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factor(4) == factor(50) == 1.0
    assert factor(75) == pytest.approx(0.5)
    assert 0 < factor(99) <= 0.021
    assert warm_up_then_decay(100, warm_up=0, decay=0)(99) == 1.0


def test_a_cosine_falls_to_its_lowest_share():
    factor = warm_up_then_decay(101, warm_up=0, decay=1.0, shape="cosine", lowest=0.1)
    assert factor(0) == 1.0
    assert factor(50) == pytest.approx(0.1 + 0.9 * 0.5, abs=0.01)
    assert factor(100) == pytest.approx(0.1, abs=1e-3)
    assert warm_up_then_decay(100, 0, 0.5, lowest=0.2)(99) == pytest.approx(0.2, abs=0.02)


def test_an_exploding_loss_leaves_the_update_out_and_is_counted():
    network = nn.Linear(1, 1, bias=False)
    update = updater(network, explosion=10.0)
    for _ in range(25):
        network.weight.sum().backward()
        update.step(torch.tensor(1.0))
    before = network.weight.clone()
    network.weight.sum().backward()
    update.step(torch.tensor(1e3))
    assert torch.equal(network.weight, before)
    assert (update.updates, update.skipped) == (25, 1)
    network.weight.sum().backward()
    update.step(torch.tensor(2.0))
    assert update.updates == 26


def step(updater, loss):
    loss.backward()
    updater.step()


def test_the_optimiser_uses_the_factor_of_its_own_update():
    network = nn.Linear(1, 1, bias=False)
    update = updater(network, schedule=lambda n: [0.0, 0.5][n], max_grad_norm=1e9)
    start = network.weight.item()
    step(update, network.weight.sum())
    assert network.weight.item() == start
    step(update, network.weight.sum())  # Adam's step has the size of the learning rate for a constant gradient
    assert network.weight.item() == pytest.approx(start - 0.05, abs=1e-6)
    assert update.updates == 2


def test_the_gradient_is_clipped_to_the_global_norm():
    ours, plain = nn.Linear(4, 4), nn.Linear(4, 4)
    plain.load_state_dict(ours.state_dict())
    adam = torch.optim.AdamW(plain.parameters(), lr=0.1, betas=(0.5, 0.999), weight_decay=0.0)
    update = updater(ours, max_grad_norm=0.5, betas=(0.5, 0.999))
    for scale in (1.0, 1e3, 1e-3):
        step(update, scale * ours(torch.ones(2, 4)).square().sum())
        adam.zero_grad()
        (scale * plain(torch.ones(2, 4)).square().sum()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adam.step()
    torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-6, atol=1e-7)


def test_an_update_whose_gradient_is_not_finite_is_left_out_and_counted():
    network = nn.Linear(2, 2)
    update = updater(network)
    before = network.weight.detach().clone()
    step(update, network(torch.full((1, 2), float("nan"))).sum())
    assert torch.equal(network.weight, before)
    assert (update.attempts, update.updates, update.skipped) == (1, 0, 1)
    step(update, network(torch.ones(1, 2)).sum())
    assert not torch.equal(network.weight, before)
    assert (update.attempts, update.updates, update.skipped) == (2, 1, 1)


def test_the_moving_average_follows_its_recurrence_and_never_trains():
    network = nn.Linear(1, 1, bias=False)
    average = EMA(network, decay=0.5)
    update = updater(network, average=average)
    expected = network.weight.item()
    for n in range(6):
        step(update, network.weight.sum())
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * network.weight.item()
        assert average.network.weight.item() == pytest.approx(expected, rel=1e-5)
    assert not average.network.weight.requires_grad
    assert not average.network.training


def test_a_moving_average_of_decay_zero_is_the_network():
    network = nn.Linear(2, 2)
    average = EMA(network, decay=0.0)
    step(updater(network, average=average), network(torch.ones(1, 2)).sum())
    assert torch.equal(average.network.weight, network.weight)


def test_an_update_that_is_left_out_leaves_the_average_too_and_buffers_follow_the_network():
    network = nn.BatchNorm1d(2)
    average = EMA(network, decay=0.5)
    update = updater(network, average=average)
    before = average.network.weight.clone()
    step(update, network(torch.randn(4, 2)).sum() * float("nan"))
    assert torch.equal(average.network.weight, before)
    assert not average.network.running_mean.any()
    step(update, network(torch.randn(4, 2)).sum())
    assert not torch.equal(average.network.weight, before)
    assert torch.equal(average.network.running_mean, network.running_mean)
    assert network.running_mean.any()
