"""R1 against closed forms and against plain double backward; what its forward passes leave behind; lazy steps."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdistill.losses import LazyR1, frozen_state, hinge_discriminator_loss, hinge_r1_loss, r1_penalty
from fastdistill.losses.r1 import MODES
from fastdistill.ops import attention

GAMMA = 1.7


def textbook(discriminator, x, gamma=GAMMA):
    """gamma/2 mean over the batch of |grad D|^2, D the sum of a sample's logits; plain double backward."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return gamma / 2 * grad.flatten(1).square().sum(1).mean()


def parameter_gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, materialize_grads=True)


def assert_same(ours, expected, rtol=1e-9):
    """To a part of the largest of all: a bias in front of batch statistics has a gradient of rounding errors alone."""
    largest = max(float(b.abs().max()) for b in expected)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * largest)


def small_critic():
    """Four logits per sample."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 1, 3))
    return net.double()


class CoupledHead(nn.Module):
    """Batch statistics couple the samples, as BatchNormLocal does."""

    def __init__(self, width=6):
        super().__init__()
        self.first, self.last = nn.Linear(width, 5), nn.Linear(5, 1)

    def forward(self, x):
        h = self.first(x)
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 0.1).sqrt()
        return self.last(torch.tanh(h))


class Quadratic(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, width))

    def forward(self, x):
        return torch.einsum("bi,ij,bj->b", x, self.matrix, x)


# ---- values and conventions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_of_a_linear_head_it_is_half_gamma_times_the_squared_weight(mode):
    head = nn.Linear(12, 1).double()
    x = torch.randn(5, 12, dtype=torch.float64)
    penalty = r1_penalty(head, x, gamma=GAMMA, mode=mode)
    torch.testing.assert_close(penalty, GAMMA / 2 * head.weight.square().sum())
    assert_same(parameter_gradients(penalty, head), (GAMMA * head.weight, torch.zeros(1, dtype=torch.float64)))


def test_approximate_has_that_mean_on_a_linear_head():
    head = nn.Linear(12, 1).double()
    penalty = r1_penalty(head, torch.randn(40_000, 12, dtype=torch.float64), gamma=GAMMA, mode="approximate")
    # (w n)^2 has variance 2 |w|^4: three deviations of the mean.
    torch.testing.assert_close(penalty, GAMMA / 2 * head.weight.square().sum(), rtol=3 * (2 / 40_000) ** 0.5, atol=0)


def test_approximate_is_equal_in_expectation_up_to_the_square_of_sigma():
    critic, x = small_critic(), torch.randn(1, 2, 6, 6, dtype=torch.float64)
    many = x.expand(20_000, -1, -1, -1)
    with torch.no_grad():
        penalty = r1_penalty(critic, many, gamma=GAMMA, mode="approximate", sigma=1e-3)
    torch.testing.assert_close(penalty, textbook(critic, x).detach(), rtol=0.04, atol=0)


def test_exact_is_the_textbook_and_the_batch_does_not_scale_it():
    critic, x = small_critic(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    penalty = r1_penalty(critic, x, gamma=GAMMA)
    expected = textbook(critic, x)
    torch.testing.assert_close(penalty, expected)
    assert_same(parameter_gradients(penalty, critic), parameter_gradients(expected, critic))
    torch.testing.assert_close(r1_penalty(critic, x.repeat(4, 1, 1, 1), gamma=GAMMA), expected)


@pytest.mark.parametrize("mode", MODES)
def test_d_is_the_sum_of_a_sample_s_logits(mode):
    critic, x = small_critic(), torch.randn(3, 2, 7, 7, dtype=torch.float64)
    summed = lambda x: critic(x).sum(dim=(1, 2, 3))  # noqa: E731
    torch.manual_seed(1)
    penalty = r1_penalty(critic, x, gamma=GAMMA, mode=mode)
    torch.manual_seed(1)
    torch.testing.assert_close(penalty, r1_penalty(summed, x, gamma=GAMMA, mode=mode))
    assert penalty > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads", ["mean", "sum"])
def test_several_heads_on_one_input_are_one_d(mode, heads):
    a, b = nn.Linear(6, 3).double(), nn.Linear(6, 1).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    together = lambda x: (a(x).sum(1) + b(x).sum(1)) / (2 if heads == "mean" else 1)  # noqa: E731
    torch.manual_seed(1)
    penalty = r1_penalty(lambda x: [a(x), b(x)], x, gamma=GAMMA, mode=mode, heads=heads)
    torch.manual_seed(1)
    torch.testing.assert_close(penalty, r1_penalty(together, x, gamma=GAMMA, mode=mode))


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
@pytest.mark.parametrize("heads", ["mean", "sum"])
def test_at_head_inputs_each_head_has_a_penalty_of_its_own(mode, heads):
    first, second = CoupledHead(6).double(), CoupledHead(9).double()
    x = [torch.randn(4, 6, dtype=torch.float64), 30 * torch.randn(4, 9, dtype=torch.float64)]
    both = nn.ModuleList([first, second])
    penalty = r1_penalty(lambda x: [first(x[0]), second(x[1])], x, gamma=GAMMA, mode=mode, heads=heads)
    expected = (textbook(first, x[0]) + textbook(second, x[1])) / (2 if heads == "mean" else 1)
    torch.testing.assert_close(penalty, expected)
    rtol = 1e-9 if mode == "exact" else 0.01  # a step of one percent
    assert_same(parameter_gradients(penalty, both), parameter_gradients(expected, both), rtol)


# ---- finite differences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [None, 0.3, 1e-3])
def test_finite_difference_gradient_is_exact_on_a_quadratic_head_at_any_step(step):
    head, x = Quadratic().double(), torch.randn(5, 6, dtype=torch.float64)
    penalty, expected = r1_penalty(head, x, gamma=GAMMA, mode="finite_difference", step=step), textbook(head, x)
    torch.testing.assert_close(penalty, expected)
    assert_same(parameter_gradients(penalty, head), parameter_gradients(expected, head), 1e-8)


@pytest.mark.parametrize(("step", "error"), [(0.1, 1e-2), (1e-3, 1e-6)])
def test_finite_difference_gradient_has_second_order_where_samples_are_coupled(step, error):
    head, x = CoupledHead().double(), torch.randn(5, 6, dtype=torch.float64)
    penalty, expected = r1_penalty(head, x, gamma=GAMMA, mode="finite_difference", step=step), textbook(head, x)
    torch.testing.assert_close(penalty, expected)
    assert_same(parameter_gradients(penalty, head), parameter_gradients(expected, head), error)


def test_finite_difference_in_float32_is_good_to_a_percent_under_autocast_too():
    head, x = CoupledHead(), torch.randn(16, 6).bfloat16()
    exact = copy.deepcopy(head).double()
    expected = parameter_gradients(textbook(exact, x.double()), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = r1_penalty(head, x.float(), gamma=GAMMA, mode="finite_difference")
        inside = r1_penalty(head, x, gamma=GAMMA, mode="finite_difference")
    assert torch.equal(penalty, inside)
    assert_same([g.double() for g in parameter_gradients(penalty, head)], expected, 0.01)


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_of_zero_gives_zero_and_no_nan(mode):
    head = nn.Linear(6, 1)
    nn.init.zeros_(head.weight)
    for x in (torch.randn(3, 6), torch.zeros(3, 6)):
        penalty = r1_penalty(head, x, gamma=GAMMA, mode=mode)
        assert penalty == 0
        assert all(g.abs().max() == 0 for g in parameter_gradients(penalty, head))


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_gives_zero(mode):
    head = nn.Linear(6, 1)
    penalty = r1_penalty(head, torch.zeros(0, 6), gamma=GAMMA, mode=mode)
    assert penalty == 0
    assert all(g.abs().max() == 0 for g in parameter_gradients(penalty, head))


@pytest.mark.parametrize("mode", MODES)
def test_the_data_gets_no_gradient_and_the_discriminator_gets_one(mode):
    critic, x = small_critic(), torch.randn(3, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    r1_penalty(critic, x * 1.0, gamma=GAMMA, mode=mode).backward()
    assert x.grad is None
    assert critic[0].weight.grad.abs().sum() > 0


def test_exact_may_be_differentiated_again_and_passes_gradcheck():
    def penalty(weight, other):
        return r1_penalty(lambda x: torch.tanh(x @ weight) @ other, x, gamma=GAMMA)

    x = torch.randn(3, 4, dtype=torch.float64)
    weights = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (3, 2))]
    assert torch.autograd.gradcheck(penalty, weights)
    assert torch.autograd.gradgradcheck(penalty, weights)


@pytest.mark.parametrize("mode", MODES)
def test_without_gradients_the_value_is_the_same_and_has_no_graph(mode):
    critic, x = small_critic(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    torch.manual_seed(2)
    expected = r1_penalty(critic, x, gamma=GAMMA, mode=mode)
    torch.manual_seed(2)
    with torch.no_grad():
        found = r1_penalty(critic, x, gamma=GAMMA, mode=mode)
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad


# ---- the state of the network ---------------------------------------------------------------------------------------


def stateful(kind):
    norm = nn.utils.spectral_norm if kind == "hook" else nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        norm(nn.Linear(6, 8)), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Dropout(0.5), norm(nn.Linear(8, 1))
    ).double()


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("kind", ["hook", "parametrization"])
@pytest.mark.parametrize("called_as", ["module", "method", "function"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_in_the_network_has_moved_afterwards_and_training_goes_on(mode, called_as, kind):
    critic, x = stateful(kind), torch.randn(7, 6, dtype=torch.float64)
    call = {"module": critic, "method": critic.forward, "function": lambda x: critic(x)}[called_as]
    before, buffers = state(critic), {name: id(b) for name, b in critic.named_buffers()}
    penalty = r1_penalty(call, x, gamma=GAMMA, mode=mode)
    after = state(critic)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name: id(b) for name, b in critic.named_buffers()} == buffers
    critic(x)  # which iterates the norms and moves the statistics, in place
    assert any(not torch.equal(before[name], value) for name, value in state(critic).items())
    penalty.backward()  # of the values that the penalty saw
    assert (
        critic[4]
        .get_parameter("weight_orig" if kind == "hook" else "parametrizations.weight.original")
        .grad.isfinite()
        .all()
    )


@pytest.mark.parametrize("kind", ["hook", "parametrization"])
@pytest.mark.parametrize("mode", ["approximate", "finite_difference"])
def test_every_forward_sees_the_same_weights_and_dropout(mode, kind):
    critic, x = stateful(kind), torch.randn(7, 6, dtype=torch.float64)
    weights, masks = [], []
    critic[0].register_forward_hook(lambda module, *_: weights.append(module.weight.detach().clone()))
    critic[3].register_forward_hook(lambda _, args, out: masks.append(out == 0))
    r1_penalty(critic, x, gamma=GAMMA, mode=mode)
    assert len(weights) == {"approximate": 2, "finite_difference": 3}[mode]
    assert all(torch.equal(weights[0], w) for w in weights[1:])
    assert all(torch.equal(masks[0], m) for m in masks[1:])
    assert 0 < masks[0].double().mean() < 1


def test_the_next_penalty_draws_other_random_numbers():
    critic, x = nn.Linear(6, 1), torch.randn(5, 6)
    first, second = (r1_penalty(critic, x, gamma=GAMMA, mode="approximate") for _ in range(2))
    assert first != second


def test_frozen_state_ends_where_it_is_left_by_an_error():
    critic = stateful("hook")
    before = state(critic)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), frozen_state(critic):
        nn.Sequential(critic, nn.Linear(2, 1).double())(torch.randn(7, 6, dtype=torch.float64))
    assert all(torch.equal(before[name], value) for name, value in state(critic).items())
    critic(torch.randn(7, 6, dtype=torch.float64))
    assert any(not torch.equal(before[name], value) for name, value in state(critic).items())


# ---- critics without a second derivative ----------------------------------------------------------------------------


class AttentionCritic(nn.Module):
    def __init__(self, attend=nn.functional.scaled_dot_product_attention):
        super().__init__()
        self.qkv, self.last, self.attend = nn.Linear(8, 24), nn.Linear(8, 1), attend

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.last(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad


CRITICS = {
    "torch's attention": AttentionCritic,
    "this package's attention": lambda: AttentionCritic(attention),
    "once_differentiable": lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), _Module(Once.apply), nn.Linear(8, 1)),
}


class _Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.mark.parametrize("critic", CRITICS)
def test_exact_on_a_critic_without_second_derivatives_names_the_others(critic):
    critic, x = CRITICS[critic](), torch.randn(2, 5, 8)
    message = (
        'mode="exact" needs second derivatives .* first derivatives only.*mode="approximate".*"finite_difference".*'
        r'sdpa_kernel\(SDPBackend\.MATH\).*backend="reference".*LazyR1'
    )
    with pytest.raises(RuntimeError, match=message):
        r1_penalty(critic, x, gamma=GAMMA)
    with pytest.raises(RuntimeError, match=message):
        hinge_r1_loss(critic, x, x, gamma=GAMMA)


def test_what_that_error_names_works():
    critic, x = AttentionCritic(), torch.randn(2, 5, 8)
    with sdpa_kernel(SDPBackend.MATH):
        expected = r1_penalty(critic, x, gamma=GAMMA)
        gradients = parameter_gradients(expected, critic)
    reference = copy.deepcopy(critic)
    reference.attend = lambda q, k, v: attention(q, k, v, backend="reference")
    torch.testing.assert_close(r1_penalty(reference, x, gamma=GAMMA), expected)
    finite = r1_penalty(critic, x, gamma=GAMMA, mode="finite_difference")
    torch.testing.assert_close(finite, expected)
    assert_same(parameter_gradients(finite, critic), gradients, 0.02)
    assert parameter_gradients(r1_penalty(critic, x, gamma=GAMMA, mode="approximate"), critic)[0].abs().sum() > 0


# ---- lazy -----------------------------------------------------------------------------------------------------------


def test_lazy_scales_rate_momenta_and_penalty():
    lazy = LazyR1(16)
    settings = lazy.optimizer_kwargs(lr=2e-3, betas=(0.5, 0.99))
    assert settings == {"lr": 2e-3 * 16 / 17, "betas": (0.5 ** (16 / 17), 0.99 ** (16 / 17))}
    torch.optim.Adam(nn.Linear(2, 2).parameters(), **settings)
    assert [step for step in range(40) if lazy.due(step)] == [0, 16, 32]
    critic, x = small_critic(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(lazy.penalty(critic, x, gamma=GAMMA), 16 * textbook(critic, x))


def test_lazy_keeps_the_decay_of_momenta_and_the_mean_penalty_over_an_interval():
    lazy, betas = LazyR1(4), (0.9, 0.99)
    scaled = lazy.optimizer_kwargs(1.0, betas)
    for plain, scaled_beta in zip(betas, scaled["betas"]):
        assert scaled_beta ** (4 + 1) == pytest.approx(plain**4)
    assert scaled["lr"] * (4 + 1) == pytest.approx(4)
    # Along a constant penalty gradient, plain descent goes as far in 4 steps as 4 ordinary ones with one lazy.
    head, x = nn.Linear(3, 1, bias=False).double(), torch.randn(2, 3, dtype=torch.float64)
    every = 4 * parameter_gradients(r1_penalty(head, x, gamma=GAMMA), head)[0]
    due = sum(lazy.due(step) for step in range(4)) * parameter_gradients(lazy.penalty(head, x, gamma=GAMMA), head)[0]
    torch.testing.assert_close(due, every)


def test_lazy_needs_a_whole_interval():
    for interval in (0, -1, 1.5):
        with pytest.raises(ValueError, match="interval must be a whole number of steps, at least 1"):
            LazyR1(interval)


# ---- a discriminator's step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_hinge_r1_loss_is_the_sum_of_both(mode):
    critic, x = small_critic(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    fake = torch.randn(5, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    loss, stats = hinge_r1_loss(critic, x, fake, gamma=GAMMA, mode=mode)
    torch.manual_seed(3)
    penalty = r1_penalty(critic, x, gamma=GAMMA, mode=mode)
    hinge = hinge_discriminator_loss(critic(x), critic(fake.detach()))
    torch.testing.assert_close(loss, hinge + penalty)
    torch.testing.assert_close(stats.hinge, hinge.detach())
    torch.testing.assert_close(stats.penalty, penalty.detach())
    torch.testing.assert_close(stats.real.mean, critic(x).mean().detach())
    torch.testing.assert_close(stats.fake.mean, critic(fake).mean().detach())
    assert_same(parameter_gradients(loss, critic), parameter_gradients(hinge + penalty, critic))
    assert torch.autograd.grad(loss + 0 * fake.sum(), fake)[0].abs().max() == 0
    assert not any(t.requires_grad for t in (stats.hinge, stats.penalty, *stats.real, *stats.fake))


def test_hinge_r1_loss_at_head_inputs_calls_the_heads_once_for_each_kind():
    heads, calls = nn.ModuleList([CoupledHead(6), CoupledHead(9)]).double(), []

    def discriminator(features):
        calls.append(len(features))
        return [head(f) for head, f in zip(heads, features)]

    real, fake = ([torch.randn(4, w, dtype=torch.float64) for w in (6, 9)] for _ in range(2))
    loss, _ = hinge_r1_loss(discriminator, real, fake, gamma=GAMMA, heads="sum")
    assert calls == [2, 2]
    hinge = hinge_discriminator_loss(discriminator(real), discriminator(fake), heads="sum")
    expected = hinge + sum(textbook(head, x) for head, x in zip(heads, real))
    torch.testing.assert_close(loss, expected)
    assert_same(parameter_gradients(loss, heads), parameter_gradients(expected, heads))


def test_gamma_zero_leaves_the_penalty_out():
    critic, x = AttentionCritic(), torch.randn(2, 5, 8)
    loss, stats = hinge_r1_loss(critic, x, x, gamma=0.0)
    assert stats.penalty == 0
    assert torch.equal(loss.detach(), stats.hinge)


def test_a_step_moves_the_state_of_the_network_once_for_each_kind():
    for mode in MODES:
        critic, x, fake = stateful("hook"), *torch.randn(2, 7, 6, dtype=torch.float64)
        plain = copy.deepcopy(critic)
        loss, _ = hinge_r1_loss(critic, x, fake, gamma=GAMMA, mode=mode)
        plain(x), plain(fake)
        assert critic[1].num_batches_tracked == 2
        assert torch.equal(critic[0].weight_u, plain[0].weight_u)
        loss.backward()


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "settings", "error", "message"),
    [
        (1.0, {}, TypeError, "x: expected a tensor or a list of head inputs, got float"),
        ([], {}, ValueError, "x: expected at least one head input, got none"),
        (torch.ones(2, 6).long(), {}, TypeError, "x: expected floating point, got torch.int64"),
        ([torch.ones(2, 6), torch.ones(3, 6)], {}, ValueError, r"x\[1\]: expected \(B, \.\.\.\), .* shape \(3, 6\)"),
        ([torch.ones(2, 6)] * 2, {}, ValueError, "must return the logits of each of the 2 head inputs; got 1"),
        (torch.ones(2, 6), {"gamma": -1.0}, ValueError, r"gamma must be a finite number >= 0; got -1\.0"),
        (torch.ones(2, 6), {"mode": "lazy"}, ValueError, "mode must be one of exact, approximate, .* got 'lazy'"),
        (torch.ones(2, 6), {"heads": "max"}, ValueError, "heads must be 'mean' or 'sum'; got 'max'"),
        (torch.ones(2, 6), {"sigma": 0.0}, ValueError, r"sigma must be a finite number > 0; got 0\.0"),
        (torch.ones(2, 6), {"step": float("nan")}, ValueError, "step must be a finite number > 0, or None; got nan"),
    ],
)
def test_bad_input_names_the_argument_the_value_and_the_need(x, settings, error, message):
    def discriminator(x):
        return [(x if isinstance(x, torch.Tensor) else x[0]).sum(1)]

    with pytest.raises(error, match=message):
        r1_penalty(discriminator, x, **{"gamma": 1.0, **settings})


def test_a_discriminator_that_returns_something_else_is_named():
    x = torch.ones(2, 6)
    with pytest.raises(ValueError, match=r"the logits of head 0 must be \(2, \.\.\.\); got \(\)"):
        r1_penalty(lambda x: x.mean(), x, gamma=1.0)
    with pytest.raises(ValueError, match="its logits do not depend on x"):
        r1_penalty(lambda x: x.detach().sum(1), x, gamma=1.0)
    with pytest.raises(ValueError, match="real and fake must both be tensors or both lists"):
        hinge_r1_loss(lambda x: x, x, [x], gamma=1.0)
