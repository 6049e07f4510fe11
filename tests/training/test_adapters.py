"""Roles as adapters of one frozen base."""

import copy

import pytest
import torch
from fastdistill.training.adapters import AdapterRole, SharedBase

from .toys import tiny_pipeline


@pytest.fixture
def base():
    return SharedBase(tiny_pipeline().unet, rank=4)


def inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    return x, torch.tensor([10, 900]), torch.randn(2, 24, 64, generator=generator)


def call(network):
    x, t, states = inputs()
    return network(x, t, encoder_hidden_states=states, return_dict=False)[0]


def moved(role, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in role.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return role


def test_a_new_role_is_the_base_and_holds_only_its_adapter(base):
    plain = call(base.network)
    student = base.role("student")
    assert torch.equal(call(student), plain)
    count = sum(p.numel() for p in student.parameters())
    whole = sum(p.numel() for p in base.network.parameters())
    assert 0 < count < 0.5 * whole
    assert set(student.state_dict()) == {f"adapter.{name}" for name in student.adapter}


def test_roles_do_not_see_one_another(base):
    teacher, student, fake_score = base.role(None), base.role("student"), base.role("fake_score")
    plain = call(teacher)
    moved(student, 1)
    of_student = call(student)
    assert torch.equal(call(teacher), plain)
    assert torch.equal(call(fake_score), plain)
    moved(fake_score, 2)
    assert torch.equal(call(student), of_student)
    assert not torch.equal(call(fake_score), of_student)


def test_a_role_that_was_called_in_between_changes_no_gradient(base):
    student, fake_score = moved(base.role("student")), moved(base.role("fake_score"), 2)
    call(student).square().mean().backward()
    alone = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    loss = call(student).square().mean()
    call(fake_score)
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(student.parameters(), alone))
    assert all(p.grad is None for p in fake_score.parameters())


def test_gradient_checkpointing_recomputes_with_the_adapter_of_the_forward(base):
    student, fake_score = moved(base.role("student")), moved(base.role("fake_score"), 2)
    call(student).square().mean().backward()
    plain = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    base.network.enable_gradient_checkpointing(base.checkpoint)
    base.network.train()
    loss = call(student).square().mean()
    call(fake_score)
    loss.backward()
    for p, g in zip(student.parameters(), plain):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-8)


def test_requires_grad_is_the_trainers_to_say(base):
    student, fake_score = base.role("student"), base.role("fake_score")
    fake_score.requires_grad_(False)
    call(student)
    call(fake_score)
    base.role("another")
    assert not any(p.requires_grad for p in fake_score.parameters())
    assert all(p.requires_grad for p in student.parameters())
    trained = [name for name, p in base.network.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)


def test_a_deep_copy_is_another_adapter_with_equal_weights(base):
    student = moved(base.role("student"))
    average = copy.deepcopy(student)
    assert isinstance(average, AdapterRole)
    assert torch.equal(call(average), call(student))
    moved(student, 5)
    assert not torch.equal(call(average), call(student))


def test_a_merged_role_is_a_plain_network_with_the_same_outputs(base):
    names = set(tiny_pipeline().unet.state_dict())
    student = moved(base.role("student"))
    expected = call(student)
    network = student.merged()
    assert set(network.state_dict()) == names
    torch.testing.assert_close(call(network), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(call(student), expected)


def test_bad_ranks_and_layers_are_named():
    with pytest.raises(ValueError, match="rank must be 1 or more; got 0"):
        SharedBase(tiny_pipeline().unet, rank=0)
    with pytest.raises(ValueError, match="nothing"):
        SharedBase(tiny_pipeline().unet, rank=1, target_modules=["nothing"]).role("student")
