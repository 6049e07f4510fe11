"""add_distillation_loss against the formula, score distillation's gradient and plain PyTorch."""

import pytest
import torch

from fastdistill import diffusion
from fastdistill.losses import add_distillation_loss

SHAPE = (3, 4, 5, 7)


def batch(dtype=torch.float64, shape=SHAPE):
    x, teacher = torch.randn(shape, dtype=torch.float64).to(dtype), torch.randn(shape, dtype=torch.float64).to(dtype)
    t = torch.linspace(20, 980, shape[0]).long()
    return x, teacher, *diffusion.scaled_linear(dtype=torch.float64).at(t)


def plain(x, teacher, weight):
    distances = (x - teacher).square().flatten(1).mean(1)
    return (weight * distances).mean()


WEIGHTINGS = {
    "exponential": ({}, lambda alpha, sigma: alpha),
    "sds": ({"weighting": "sds"}, lambda alpha, sigma: alpha * sigma / 2),
    "sds with a number": ({"weighting": "sds", "sds_weight": 3.0}, lambda alpha, sigma: 1.5 * alpha / sigma),
    "sds with a tensor": (
        {"weighting": "sds", "sds_weight": torch.tensor([1.0, 2.0, 3.0])},
        lambda alpha, sigma: alpha * torch.tensor([1.0, 2.0, 3.0]) / (2 * sigma),
    ),
    "a tensor": ({"weighting": torch.tensor([0.5, 0.0, 2.0])}, lambda alpha, sigma: torch.tensor([0.5, 0.0, 2.0])),
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_weighting_is_the_papers_mean(weighting, dtype):
    x, teacher, alpha, sigma = batch(dtype)
    arguments, weight = WEIGHTINGS[weighting]
    x.requires_grad_()
    loss = add_distillation_loss(x, teacher, alpha, sigma, **arguments)
    expected = plain(x.double(), teacher.double(), weight(alpha, sigma))
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, expected, check_dtype=False)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


def test_numbers_weigh_as_tensors_do():
    x, teacher, *_ = batch(torch.float32)
    for arguments in ({}, {"weighting": "sds"}, {"weighting": "sds", "sds_weight": 0.7}):
        number = add_distillation_loss(x, teacher, 0.6, 0.8, **arguments)
        tensor = add_distillation_loss(x, teacher, torch.full((3,), 0.6), torch.tensor(0.8), **arguments)
        torch.testing.assert_close(number, tensor)


@pytest.mark.parametrize("sds_weight", [None, torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)])
@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_the_sds_weighting_gives_score_distillations_gradient_over_the_elements(prediction_type, sds_weight):
    x, noise, alpha, sigma = batch()
    x_t = diffusion.add_noise(x, noise, alpha, sigma)
    pred = torch.randn(SHAPE, dtype=torch.float64)  # the teacher's raw output
    teacher = diffusion.to_data(pred, x_t, alpha, sigma, prediction_type)
    eps = diffusion.to_noise(pred, x_t, alpha, sigma, prediction_type)
    x.requires_grad_()
    add_distillation_loss(x, teacher, alpha, sigma, weighting="sds", sds_weight=sds_weight).backward()
    w = (sigma**2 if sds_weight is None else sds_weight).view(-1, 1, 1, 1)
    torch.testing.assert_close(x.grad, w * (eps - noise) / x.numel())


def test_the_student_alone_receives_a_gradient():
    x, teacher, alpha, sigma = (t.float().requires_grad_() for t in batch())
    add_distillation_loss(x, teacher, alpha, sigma, weighting="sds").backward()
    assert x.grad.abs().min() > 0
    assert teacher.grad is alpha.grad is sigma.grad is None


def test_a_16_bit_student_meets_a_float32_teacher_as_it_is():
    x, teacher, alpha, sigma = batch(torch.bfloat16)
    teacher = torch.randn(SHAPE)
    x.requires_grad_()
    loss = add_distillation_loss(x, teacher, alpha, sigma)
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, plain(x.double(), teacher.double(), alpha), check_dtype=False)


def test_inputs_of_1e4_and_a_student_that_equals_its_teacher_stay_finite():
    x, teacher, alpha, sigma = batch(torch.float16)
    x, teacher = (1e4 * x.clamp(-3, 3)).requires_grad_(), 1e4 * teacher.clamp(-3, 3)  # squares overflow float16
    loss = add_distillation_loss(x, teacher, alpha, sigma)
    torch.testing.assert_close(loss, plain(x.double(), teacher.double(), alpha), check_dtype=False)
    loss = add_distillation_loss(x, x.detach(), alpha, sigma)
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_the_default_sds_weight_is_finite_without_noise():
    x, teacher, alpha, _ = batch(torch.float32)
    assert add_distillation_loss(x, teacher, alpha, torch.zeros(3), weighting="sds") == 0


def test_the_loss_compiles_into_one_graph():
    x, teacher, alpha, sigma = (t.float() for t in batch())

    def loss(x):
        return add_distillation_loss(x, teacher, alpha, sigma, weighting="sds")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    ours, plain = compiled(x), loss(x)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(plain, x))


def test_bad_input_names_the_argument_the_value_and_the_need():
    x, teacher, alpha, sigma = batch()
    for call, error, message in (
        (lambda: add_distillation_loss(x, teacher[:2], alpha, sigma), ValueError, r"x_teacher: .*got \(2, 4, 5, 7\)"),
        (lambda: add_distillation_loss(x, None, alpha, sigma), TypeError, "x_teacher: expected a tensor, got NoneType"),
        (lambda: add_distillation_loss(x.long(), teacher, alpha, sigma), TypeError, "x_student: .* got torch.int64"),
        (lambda: add_distillation_loss(x, teacher, alpha[:2], sigma), ValueError, r"alpha: .*got \(2,\)"),
        (lambda: add_distillation_loss(x, teacher, alpha, "1"), TypeError, "sigma: expected a number or a tensor"),
        (lambda: add_distillation_loss(x, teacher, float("nan"), sigma), ValueError, "alpha: .* finite .* got nan"),
        (lambda: add_distillation_loss(x, teacher, 1.0, 1.0, weighting="linear"), ValueError, "'linear'"),
        (lambda: add_distillation_loss(x, teacher, 1.0, 1.0, weighting=alpha[:1]), ValueError, r"weighting: .*\(1,\)"),
        (lambda: add_distillation_loss(x, teacher, 1.0, 1.0, sds_weight=2.0), ValueError, 'only with weighting="sds"'),
        (
            lambda: add_distillation_loss(x, teacher, 1.0, 0.0, weighting="sds", sds_weight=1.0),
            ValueError,
            "sigma: the weighting 'sds' is infinite at sigma = 0",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
