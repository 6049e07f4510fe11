"""The Triton kernels of layer_norm in Triton's interpreter: every regime, against float64.

tests/ops/test_layer_norm.py covers the op on every backend. Here the limits are lowered so that short rows take the
ways that long ones take, and few rows those of many.
"""

import pytest
import torch
import torch.nn.functional as F
from fastdistill.kernels import layer_norm as op
from fastdistill.kernels.launch import run_all
from fastdistill.kernels.layer_norm import backward, forward, tiles

from tests.ops.accuracy import assert_close_to_exact

pytestmark = pytest.mark.interpreter


@pytest.fixture(params=["whole", "whole, programs walk several tiles", "blocks", "blocks, programs walk several rows"])
def regime(request, monkeypatch):
    if "blocks" in request.param:
        for module, limit in ((forward, "MAX_WHOLE_FORWARD"), (backward, "MAX_WHOLE_BACKWARD")):
            monkeypatch.setattr(module, limit, 0)
            monkeypatch.setattr(module, "BLOCK", 16)
    if "several" in request.param:
        monkeypatch.setattr(tiles, "WARPS_PER_WAVE", 16)
        monkeypatch.setattr(tiles, "TILE_ELEMENTS", 128)
        monkeypatch.setitem(backward.SUM_BLOCK, "BLOCK_P", 2)
    return request.param


def inputs(shape, dtype=torch.float32, mean=0.0, std=1.0):
    """x, residual, weight, bias, grad_y, grad_s."""
    x, residual = ((torch.randn(shape) * std + mean).to(dtype) for _ in range(2))
    grad_y, grad_s = (torch.randn(shape).to(dtype) for _ in range(2))
    return x, residual, torch.randn(shape[-1]) + 1, torch.randn(shape[-1]), grad_y, grad_s


NAMES = ("y", "mean", "rstd", "grad_x", "grad_weight", "grad_bias")


def run(x, residual, weight, bias, grad_y, grad_s, eps=1e-5):
    """What `NAMES` says."""
    y, s, mean, rstd = op.layer_norm(x, residual, weight, bias, eps)
    s = x if residual is None else s
    return y, mean, rstd, *op.layer_norm_backward(grad_y, grad_s, s, weight, mean, rstd, True)


def in_pytorch(s, weight, bias, grad_y, grad_s, eps=1e-5, dtype=torch.float64):
    s, weight, bias, grad_y = (t.detach().to(dtype).requires_grad_() for t in (s, weight, bias, grad_y))
    y = F.layer_norm(s, s.shape[-1:], weight, bias, eps)
    grad_x, *rest = torch.autograd.grad(y, (s, weight, bias), grad_y)
    rows = s.detach().reshape(-1, s.shape[-1])
    rstd = 1 / torch.sqrt(rows.var(dim=1, correction=0) + eps)
    return y.detach(), rows.mean(dim=1), rstd, grad_x if grad_s is None else grad_x + grad_s.to(dtype), *rest


def check(x, residual, weight, bias, grad_y, grad_s, large_mean=False):
    ours = run(x, residual, weight, bias, grad_y, grad_s)
    # Of the sum as the kernel rounded it: the interpreter truncates float32 to bfloat16.
    s = x if residual is None else op.layer_norm(x, residual, weight, bias, 1e-5)[1]
    call = (s, weight, bias, grad_y, grad_s)
    exact, in_float32, in_dtype = (in_pytorch(*call, dtype=d) for d in (torch.float64, torch.float32, x.dtype))
    for name, value, exact_, torch32, torchs in zip(NAMES, ours, exact, in_float32, in_dtype):
        rounded = name in ("y", "grad_x")
        assert value.dtype == (x.dtype if rounded else torch.float32), name
        assert_close_to_exact(
            value,
            exact_,
            torchs if rounded else torch32,  # what is not rounded to x's dtype is held to float32, whatever x is
            value.dtype,
            large_mean=large_mean,
            whole_ulp=value.dtype == torch.bfloat16,
            what=name,
        )
    return ours


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 5, 33), torch.float32),
        ((37, 3), torch.float32),
        ((5, 1), torch.float32),
        ((1, 200), torch.float16),
        ((7, 40), torch.bfloat16),
    ],
)
def test_every_regime_equals_float64(regime, shape, dtype):
    x, residual, *others = inputs(shape, dtype)
    y, *_, grad_x, _, _ = check(x, residual, *others)
    assert y.stride() == grad_x.stride() == x.stride()
    *others, _ = others
    check(x, None, *others, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_sum_is_rounded_as_pytorch_rounds_it(regime, dtype):
    x, residual, weight, bias, *_ = inputs((6, 50), dtype)
    assert torch.equal(op.layer_norm(x, residual, weight, bias, 1e-5)[1], x + residual)


def test_a_large_mean_costs_no_digits(regime):
    x, _, weight, bias, grad_y, _ = inputs((6, 90), mean=100.0, std=0.01)
    ours = check(x, None, weight, bias, grad_y, None, large_mean=True)
    exact = in_pytorch(x, weight, bias, grad_y, None)
    # The mean is carried with its rounding error; rounded to float32 alone it is off by up to 4e-4 deviations.
    assert (ours[0] - exact[0]).abs().max() < 2e-5
    for value, exact_ in zip(ours[3:], exact[3:]):
        assert (value - exact_).abs().max() < 2e-5 * exact_.abs().max()


def test_an_outlier_in_front_does_not_spoil_the_variance(regime):
    x, _, weight, bias, _, _ = inputs((4, 300))
    x[:, 0] = 1e4
    rstd = op.layer_norm(x, None, weight, bias, 1e-5)[3]
    exact = 1 / torch.sqrt(x.double().var(dim=1, correction=0) + 1e-5)
    assert ((rstd - exact) / exact).abs().max() < 1e-6


def test_nothing_is_read_beside_the_rows_or_before_it_is_written(regime):
    # x and the gradients are parts of larger tensors of NaN, and every result and workspace is full of NaN before.
    def inside(values):
        return torch.full((9, 60), float("nan"))[1:8, 7:48].copy_(values)

    x, residual, grad_y, grad_s = (inside(torch.randn(7, 41)) for _ in range(4))
    weight, bias = (torch.full((41, 2), float("nan"))[:, 1].copy_(torch.randn(41)) for _ in range(2))

    def run_poisoned(launches, outputs, given):
        for launch in launches:
            for value in launch.arguments.values():
                if isinstance(value, torch.Tensor) and not any(value is t for t in given):
                    value.fill_(float("nan"))
        run_all(launches, x.device)
        return outputs

    given = (x, residual, weight, bias, grad_y, grad_s)
    y, s, mean, rstd = run_poisoned(*forward.plan_forward(x, residual, weight, bias, 1e-5), given)
    given = (*given, s, mean, rstd)
    grads = run_poisoned(*backward.plan_backward(grad_y, grad_s, s, weight, mean, rstd, True), given)
    exact = in_pytorch(x + residual, weight, bias, grad_y, grad_s)
    torchs = in_pytorch(x + residual, weight, bias, grad_y, grad_s, dtype=torch.float32)
    for name, value, exact_, torch_ in zip(NAMES, (y, mean, rstd, *grads), exact, torchs):
        assert_close_to_exact(value, exact_, torch_, torch.float32, what=name)


def test_a_bad_value_stays_in_its_row_but_for_the_sums_over_the_rows(regime):
    x, _, weight, bias, grad_y, _ = inputs((6, 40))
    x[4, 3] = float("nan")
    y, mean, rstd, grad_x, grad_weight, grad_bias = run(x, None, weight, bias, grad_y, None)
    own = torch.arange(6) == 4
    for value in (y, grad_x, mean[:, None], rstd[:, None]):
        assert value[own].isnan().all()
        assert value[~own].isfinite().all()
    assert grad_weight.isnan().all()
    assert grad_bias.isfinite().all()


def test_missing_parameters_are_one_and_zero(regime):
    x, residual, weight, bias, grad_y, grad_s = inputs((6, 40))
    named = run(x, residual, torch.ones_like(weight), torch.zeros_like(bias), grad_y, torch.zeros_like(grad_s))
    missing = run(x, residual, None, None, grad_y, None)
    for name, a, b in zip(NAMES, named, missing):
        assert torch.equal(a, b), name


def test_without_sums_the_gradient_of_x_is_the_same(regime):
    x, _, weight, bias, grad_y, grad_s = inputs((17, 40))
    _, _, mean, rstd = op.layer_norm(x, None, weight, bias, 1e-5)
    with_sums = op.layer_norm_backward(grad_y, grad_s, x, weight, mean, rstd, True)
    without = op.layer_norm_backward(grad_y, grad_s, x, weight, mean, rstd, False)
    assert torch.equal(with_sums[0], without[0])
    assert without[1].numel() == without[2].numel() == 0


def test_the_same_call_gives_the_same_bits(regime):
    call = inputs((19, 40), torch.float16)
    for name, a, b in zip(NAMES, run(*call), run(*call)):
        assert torch.equal(a, b), name
