"""The adversarial losses by name: formulas, statistics, who gets a gradient, bad input. The op has its own tests."""

import pytest
import torch
import torch.nn.functional as F

from fastdistill.losses import (
    hinge_discriminator_loss,
    hinge_generator_loss,
    softplus_discriminator_loss,
    softplus_generator_loss,
)

FORMULAS = {
    "hinge": (lambda r, f: F.relu(1 - r).mean() + F.relu(1 + f).mean(), lambda f: -f.mean()),
    "softplus": (lambda r, f: F.softplus(-r).mean() + F.softplus(f).mean(), lambda f: F.softplus(-f).mean()),
}
LOSSES = {
    "hinge": (hinge_discriminator_loss, hinge_generator_loss),
    "softplus": (softplus_discriminator_loss, softplus_generator_loss),
}
for_each_kind = pytest.mark.parametrize("kind", LOSSES)


def logits(dtype=torch.float32):
    real = [(2 * torch.randn(shape)).to(dtype).requires_grad_() for shape in ((8, 1, 197), (8, 64), (3, 4, 6, 5))]
    fake = [(2 * torch.randn(shape)).to(dtype).requires_grad_() for shape in ((4, 1, 197), (16, 64), (2, 1, 1, 1))]
    return real, fake


@for_each_kind
@pytest.mark.parametrize("heads", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_head_is_averaged_over_its_logits_then_over_the_heads(kind, heads, dtype):
    real, fake = logits(dtype)
    discriminator_loss, generator_loss = LOSSES[kind]
    of_pair, of_fake = FORMULAS[kind]
    terms = [of_pair(r.double(), f.double()) for r, f in zip(real, fake)]
    divisor = 3 if heads == "mean" else 1
    loss = discriminator_loss(real, fake, heads=heads)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), sum(terms) / divisor, rtol=1e-6, atol=1e-6)
    expected = sum(of_fake(f.double()) for f in fake) / divisor
    torch.testing.assert_close(generator_loss(fake, heads=heads).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(discriminator_loss(real[0], fake[0]).double(), terms[0], rtol=1e-6, atol=1e-6)


@for_each_kind
def test_a_step_of_the_discriminator_parts_the_logits_and_one_of_the_generator_raises_the_fake_ones(kind):
    real, fake = logits()
    discriminator_loss, generator_loss = LOSSES[kind]
    discriminator_loss(real, fake).backward()
    assert all((t.grad <= 0).all() and (t.grad < 0).any() for t in real)
    assert all((t.grad >= 0).all() and (t.grad > 0).any() for t in fake)
    for t in fake:
        t.grad = None
    generator_loss(fake).backward()
    assert all((t.grad < 0).all() for t in fake)


@for_each_kind
def test_statistics_say_what_a_log_needs_and_carry_no_graph(kind):
    real, fake = logits()
    discriminator_loss, generator_loss = LOSSES[kind]
    loss, stats = discriminator_loss(real, fake, return_stats=True)
    assert torch.equal(loss, discriminator_loss(real, fake))
    torch.testing.assert_close(stats.real.loss + stats.fake.loss, loss.detach())
    for of, each in ((stats.real, real), (stats.fake, fake), (generator_loss(fake, return_stats=True)[1], fake)):
        per_head = [
            [t.mean(), (t > 0).float().mean(), (t < 0).float().mean(), t.sign().mean()] for t in map(torch.detach, each)
        ]
        expected = torch.tensor(per_head)
        torch.testing.assert_close(of.heads[:, 1:], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.stack(of[1:5]), expected.mean(0), rtol=1e-5, atol=1e-6)
        assert not any(t.requires_grad for t in of)


def test_the_losses_compile_without_graph_breaks():
    real, fake = logits()

    def step(real, fake):
        loss, stats = hinge_discriminator_loss(real, fake, return_stats=True)
        return loss + softplus_generator_loss(fake), stats.real.sign

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, plain = compiled(real, fake), step(real, fake)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours[0], real + fake), torch.autograd.grad(plain[0], real + fake)):
        torch.testing.assert_close(a, b)


def test_bad_input_names_the_argument_the_value_and_the_need():
    x = torch.ones(3)
    with pytest.raises(ValueError, match="real_logits: expected the logits of at least one head, got none"):
        hinge_discriminator_loss([], [])
    with pytest.raises(ValueError, match="fake_logits must have as many heads as real_logits, 2; got 1"):
        softplus_discriminator_loss([x, x], x)
    with pytest.raises(TypeError, match="fake_logits: expected a list of tensors, got float"):
        hinge_generator_loss(1.0)
    with pytest.raises(TypeError, match=r"fake_logits\[1\]: expected float32, .* got torch.int64"):
        softplus_generator_loss([x, x.long()])
    with pytest.raises(ValueError, match="heads must be 'mean' or 'sum'; got 'all'"):
        hinge_generator_loss(x, heads="all")
