"""The Triton kernels of group_norm_silu in Triton's interpreter: every regime, against float64.

tests/ops/test_group_norm_silu.py covers the op on every backend. Here the limits are lowered so that small images take
the ways that large ones take.
"""

from dataclasses import replace

import pytest
import torch
from fastdistill.kernels import group_norm_silu as op
from fastdistill.kernels.group_norm_silu import backward, configuration, forward
from fastdistill.kernels.group_norm_silu.configuration import DEFAULT
from fastdistill.kernels.launch import run_all

from tests.ops import group_norm_silu_oracle as oracle
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.group_norm_silu_oracle import GRADIENTS, NAMES, channels_last, in_pytorch, inputs

pytestmark = pytest.mark.interpreter


# 8 or 2 splits per step of a combine kernel.
SPLIT = replace(DEFAULT, max_whole_forward=0, max_whole_backward=0, split_warps=1, square=16, combine_elements=32)
REGIMES = {
    "whole": DEFAULT,
    "split": SPLIT,
    "split, several tiles per program": replace(SPLIT, programs_per_wave=4),
}


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch):
    monkeypatch.setattr(configuration, "DEFAULT", REGIMES[request.param])
    return request.param


def run(*call, **settings):
    """(y, mean, rstd, grad_x, grad_weight, grad_bias, grad_add)."""
    return oracle.run(op.group_norm_silu, op.group_norm_silu_backward, *call, **settings)


def check(*call, large_mean=False, **settings):
    ours = run(*call, **settings)
    oracle.check(ours, *call, large_mean=large_mean, truncates_bfloat16=True, **settings)
    return ours


SHAPES = {
    "10 channels per group": ((2, 30, 9, 7), 3),
    "one channel per group, prime pixels": ((1, 17, 61), 17),
    "three channels per group, three axes": ((1, 21, 3, 5, 7), 7),
    "one group of many channels": ((2, 90, 5), 1),
    "few channels, many pixels": ((1, 2, 1031), 2),
    "one pixel": ((3, 40), 4),
}


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_regime_equals_float64(regime, shape, layout):
    sizes, groups = SHAPES[shape]
    x, *others = inputs(sizes)
    y, _, _, grad_x, *_ = check(layout(x), groups, *others)
    assert y.stride() == grad_x.stride() == torch.empty_like(layout(x)).stride()


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_images_are_summed_in_float32(regime, dtype, layout):
    x, weight, bias, add, grad_y = inputs((2, 20, 13, 11), dtype)
    check(layout(x), 2, weight, bias.to(dtype), add.to(dtype), grad_y, silu=False)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_gradient_may_have_any_strides(regime, gradient, layout):
    x, weight, bias, add, grad_y = inputs((2, 24, 6, 7))
    check(layout(x), 3, weight, bias, add, GRADIENTS[gradient](layout(grad_y)))


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=["contiguous", "channels_last"])
def test_a_large_mean_costs_no_digits(regime, layout):
    x, weight, bias, add, grad_y = inputs((2, 20, 16, 9), mean=100.0, std=0.01)
    y, *_ = check(layout(x), 2, weight, bias, torch.zeros_like(add), grad_y, large_mean=True)
    exact = in_pytorch(x, 2, weight, bias, torch.zeros_like(add), grad_y)[0]
    # The forward carries the mean with its rounding error; rounded to float32 alone it is off by up to 4e-4 deviations.
    assert (y - exact).abs().max() < 1e-5


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=["contiguous", "channels_last"])
def test_an_outlier_in_front_does_not_spoil_the_variance(regime, layout):
    x, weight, bias, add, _ = inputs((1, 4, 40, 41))
    x[:, :, 0, 0] = 1e4  # the first pixel of each channel, which a shift would be taken from
    y, _, rstd = op.group_norm_silu(layout(x), 2, weight, bias, add, 1e-5, True)
    exact_y, _, exact_rstd, *_ = in_pytorch(x, 2, weight, bias, add, torch.ones_like(x))
    assert ((rstd - exact_rstd) / exact_rstd).abs().max() < 1e-6
    assert_close_to_exact(
        y, exact_y, in_pytorch(x, 2, weight, bias, add, torch.ones_like(x), dtype=torch.float32)[0], y.dtype
    )


def test_a_term_far_from_the_image_is_part_of_the_statistics(regime):
    x, weight, bias, add, grad_y = inputs((2, 30, 9, 7))
    check(x, 3, weight, bias, add * 50 - x.mean(), grad_y)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_stays_in_its_group(regime, bad):
    x, weight, bias, add, grad_y = inputs((2, 12, 9, 7))
    x[1, 5, 2, 3] = bad
    y, _, rstd, grad_x, grad_weight, grad_bias, grad_add = run(channels_last(x), 3, weight, bias, add, grad_y)
    own = torch.zeros(2, 12, dtype=torch.bool)
    own[1, 4:8] = True
    for name, value in {"y": y.flatten(2), "grad_x": grad_x.flatten(2)}.items():
        assert value[own].isnan().all(), name
        assert value[~own].isfinite().all(), name
    assert torch.equal(grad_add.isfinite(), ~own)
    assert torch.equal(grad_weight.isfinite(), ~own[1])
    assert torch.equal(grad_bias.isfinite(), ~own[1])
    assert torch.equal(rstd.isfinite(), ~own[:, ::4])


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=["contiguous", "channels_last"])
def test_nothing_is_read_beside_the_image_or_before_it_is_written(regime, layout):
    # x is a part of a larger image of NaN, and every result and workspace is full of NaN before the launches.
    whole = torch.full((3, 20, 16), float("nan"))
    x = layout(whole)[:2, :, :11] if layout is torch.Tensor.contiguous else layout(whole)[:2, 5:15]
    if layout is torch.Tensor.contiguous:
        x = torch.full((3 * 20 * 11,), float("nan"))[7 : 7 + 2 * 20 * 11].view(2, 20, 11)
    x.copy_(torch.randn(x.shape))
    weight, bias = torch.randn(x.shape[1]), torch.randn(x.shape[1])
    add = torch.full((4, 2 * x.shape[1]), float("nan"))[:2, ::2]
    add.copy_(torch.randn(add.shape))
    grad_y = torch.randn(x.shape)

    def run_poisoned(launches, outputs, given):
        for launch in launches:
            for value in launch.arguments.values():
                if isinstance(value, torch.Tensor) and not any(value is t for t in given):
                    value.fill_(float("nan"))
        run_all(launches, x.device)
        return outputs

    given = (x, weight, bias, add)
    y, mean, rstd = run_poisoned(*forward.plan_forward(x, 2, weight, bias, add, 1e-5, True), given)
    grads = run_poisoned(
        *backward.plan_backward(grad_y, x, 2, weight, bias, add, mean, rstd, True), (*given, grad_y, mean, rstd)
    )
    exact = in_pytorch(x, 2, weight, bias, add, grad_y)
    torchs = in_pytorch(x, 2, weight, bias, add, grad_y, dtype=torch.float32)
    for name, value, exact_, torch_ in zip(NAMES, (y, mean, rstd, *grads), exact, torchs):
        assert_close_to_exact(value, exact_, torch_, torch.float32, what=name)


def test_missing_parameters_are_one_and_zero(regime):
    x, weight, bias, add, grad_y = inputs((2, 12, 9, 7))
    named = run(x, 3, torch.ones_like(weight), torch.zeros_like(bias), torch.zeros_like(add), grad_y)
    missing = run(x, 3, None, None, None, grad_y)
    for name, a, b in zip(NAMES, named, missing):
        assert torch.equal(a, b), name


def test_strided_parameters_are_read_by_their_strides(regime):
    x, weight, bias, add, grad_y = inputs((2, 12, 9, 7))
    packed = run(x, 3, weight, bias, add, grad_y)
    strided = run(x, 3, weight.repeat_interleave(2)[::2], bias.repeat_interleave(3)[1::3], add.T.contiguous().T, grad_y)
    for name, a, b in zip(NAMES, packed, strided):
        assert torch.equal(a, b), name


def test_the_same_call_gives_the_same_bits(regime):
    x, *others = inputs((2, 30, 9, 7), torch.float16)
    for name, a, b in zip(NAMES, run(x, 3, *others), run(x, 3, *others)):
        assert torch.equal(a, b), name
