"""The start-up check finds every way in which public loops were wired wrongly."""

import pytest
import torch
from fastdistill.training import GradientContractError, check_gradient_contract
from fastdistill.training.contract import nudged
from fastdistill.training.world import World
from torch import nn

from .sharded_runs import trainer


@pytest.fixture
def roles():
    torch.manual_seed(0)
    return {name: nn.Linear(3, 3) for name in ("student", "teacher", "fake_score")}


X = torch.ones(2, 3)


def student_loss(roles):
    x = roles["student"](X)
    with torch.no_grad():
        target = roles["teacher"](x) - roles["fake_score"](x)
    return ((x - target) ** 2).mean()


def test_a_correct_wiring_passes_and_leaves_no_gradients_behind(roles):
    check_gradient_contract(roles, {"dmd": ("student", lambda: student_loss(roles))})
    assert all(p.grad is None for network in roles.values() for p in network.parameters())


def test_a_sample_made_without_gradient_is_detected(roles):
    def loss():
        with torch.no_grad():
            x = roles["student"](X)
        return (x**2).mean()

    with pytest.raises(GradientContractError, match=r"'dmd' gives no gradient to anything, 'student' included"):
        check_gradient_contract(roles, {"dmd": ("student", loss)})


@pytest.mark.parametrize("intruder", ["teacher", "fake_score"])
def test_a_role_left_trainable_in_anothers_turn_is_detected(roles, intruder):
    def loss():
        x = roles["student"](X)
        return ((x - roles[intruder](x)) ** 2).mean()

    with pytest.raises(GradientContractError, match=rf"'dmd' must train 'student' alone.*'{intruder}'"):
        check_gradient_contract(roles, {"dmd": ("student", loss)})


def test_even_a_zero_gradient_of_another_role_is_detected(roles):
    def loss():
        return (roles["student"](X) ** 2).mean() + 0 * roles["teacher"](X).sum()

    with pytest.raises(GradientContractError, match="'teacher'"):
        check_gradient_contract(roles, {"dmd": ("student", loss)})


def test_a_zero_gradient_of_the_own_role_is_detected(roles):
    with pytest.raises(GradientContractError, match="its gradient is zero"):
        check_gradient_contract(roles, {"dmd": ("student", lambda: 0 * roles["student"](X).sum())})


def test_a_gradient_that_is_not_finite_is_detected(roles):
    with pytest.raises(GradientContractError, match="not finite"):
        check_gradient_contract(roles, {"dmd": ("student", lambda: (roles["student"](X) * float("inf")).sum())})


def test_nudging_changes_every_parameter_and_restores_it_exactly(roles):
    network = roles["student"]
    before = [p.detach().clone() for p in network.parameters()]
    with nudged(network):
        assert all(not torch.equal(p, value) for p, value in zip(network.parameters(), before))
    assert all(torch.equal(p, value) for p, value in zip(network.parameters(), before))


def test_blocks_that_are_computed_again_in_the_backward_pass_find_the_other_roles_frozen_still():
    made = trainer(World(), memory={"checkpointing": "blocks"})  # its GAN term passes through the fake score's blocks
    made._check_contract()
    networks = made.method.roles.values()
    assert not any(p.grad is not None for network in networks for p in network.parameters())
    assert all(p.requires_grad for p in made.method.fake_score.parameters())
