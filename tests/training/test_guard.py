"""Exploding losses are told from large ones."""

import math

import torch
from fastdistill.training.guard import LossGuard


def judged(guard, *losses):
    return [bool(guard.accepts(torch.tensor(loss))) for loss in losses]


def test_a_loss_far_above_the_running_average_is_refused_and_does_not_move_it():
    guard = LossGuard(10.0, "cpu", after=3)
    assert judged(guard, 2.0, 2.0, 2.0, 21.0, 19.0) == [True, True, True, False, True]
    before = guard.mean.clone()
    assert judged(guard, -1e9) == [False]
    assert torch.equal(guard.mean, before)


def test_a_loss_near_zero_does_not_make_an_ordinary_one_an_explosion():
    guard = LossGuard(10.0, "cpu", after=3)
    assert judged(guard, *[1e-4] * 50, 9.0, 11.0) == [True] * 51 + [False]


def test_the_first_losses_are_accepted_whatever_their_size_unless_they_are_not_finite():
    guard = LossGuard(10.0, "cpu", after=3)
    assert judged(guard, 1.0, 1e6, math.nan, math.inf) == [True, True, False, False]


def test_factor_zero_refuses_only_what_is_not_finite():
    guard = LossGuard(0.0, "cpu", after=0)
    assert judged(guard, 1.0, 1e30, math.nan) == [True, True, False]


def test_a_slow_rise_is_no_explosion():
    guard = LossGuard(30.0, "cpu")
    assert all(judged(guard, *[1.02**n for n in range(500)]))


def test_doubling_with_every_update_is_one():
    guard = LossGuard(30.0, "cpu")
    assert not all(judged(guard, *[1.0] * 100, *[2.0**n for n in range(20)]))


def test_its_state_is_restored():
    guard, other = LossGuard(10.0, "cpu", after=3), LossGuard(10.0, "cpu", after=3)
    judged(guard, 5.0, 5.0, 5.0)
    other.load_state_dict(guard.state_dict())
    assert judged(other, 51.0, 49.0) == [False, True]
