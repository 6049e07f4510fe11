"""The CUDA kernels of group_norm_silu, run on the host by the emulator: every regime, against float64.

tests/ops/test_group_norm_silu.py covers the op on every backend, where there is a GPU. Here the device is described
small, so that small images take the ways that large ones take.
"""

import pytest
import torch

from tests.csrc.emulator import Device
from tests.ops import group_norm_silu_oracle as oracle
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.group_norm_silu_oracle import GRADIENTS, NAMES, channels_last, in_pytorch, inputs

pytestmark = pytest.mark.compiler

REGIMES = {
    "one block": Device(clusters=False, cooperative=0),
    "cluster": Device(threads=64, shared_bytes=12 * 1024, cooperative=0),
    "cooperative": Device(multiprocessors=40, threads=64, shared_bytes=12 * 1024, clusters=False),
    "two-pass": Device(multiprocessors=40, threads=64, shared_bytes=0, clusters=False, cooperative=0),
}
LAYOUTS = {"contiguous": torch.Tensor.contiguous, "channels_last": channels_last}


@pytest.fixture(params=REGIMES)
def regime(request):
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.fixture
def run(emulator, regime):
    """(y, mean, rstd, grad_x, grad_weight, grad_bias, grad_add) in the regime."""

    def run(*call, seed=0, **settings):
        with emulator.on(REGIMES[regime], seed):
            ours = oracle.run(
                torch.ops.fastdistill.group_norm_silu.cuda,
                torch.ops.fastdistill.group_norm_silu_backward.cuda,
                *call,
                **settings,
            )
        run.launches = emulator.launches()
        return ours

    return run


# Large enough for the small devices to cut them up.
SHAPES = {
    "16 channels per group": ((2, 48, 24, 24), 3),
    "10 channels per group": ((2, 40, 20, 16), 4),
    "10 channels per group, odd pixels": ((2, 30, 21, 23), 3),
    "one channel per group, prime pixels": ((1, 11, 1031), 11),
    "three channels per group, three axes": ((1, 21, 7, 9, 11), 7),
    "one group of many channels": ((2, 90, 35), 1),
    "few channels, many pixels": ((1, 2, 5003), 2),
    "more images than multiprocessors": ((41, 8, 9, 8), 2),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_regime_equals_float64(run, regime, shape, layout):
    sizes, groups = SHAPES[shape]
    x, *others = inputs(sizes)
    call = (layout(x), groups, *others)
    ours = run(*call)
    oracle.check(ours, *call)
    assert ours[0].stride() == ours[3].stride() == torch.empty_like(layout(x)).stride()


def test_the_devices_take_every_regime(run, regime, layout):
    x, *others = inputs((1, 32, 32, 32))
    run(layout(x), 4, *others)
    kinds = [launch.split()[0] for launch in run.launches]
    assert kinds == {"one block": ["plain"] * 2, "two-pass": ["plain"] * 6}.get(regime, [regime] * 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_images_are_summed_in_float32(run, dtype, layout):
    x, weight, bias, add, grad_y = inputs((2, 80, 24, 25), dtype)
    call = (layout(x), 4, weight, bias.to(dtype), add.to(dtype), layout(grad_y))
    oracle.check(run(*call, silu=False), *call, silu=False)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_gradient_may_have_any_strides(run, gradient, layout):
    x, weight, bias, add, grad_y = inputs((2, 24, 36, 28))
    call = (layout(x), 3, weight, bias, add, GRADIENTS[gradient](layout(grad_y)))
    oracle.check(run(*call), *call)


def test_a_large_mean_costs_no_digits(run, layout):
    x, weight, bias, add, grad_y = inputs((2, 20, 48, 36), mean=100.0, std=0.01)
    call = (layout(x), 2, weight, bias, torch.zeros_like(add), grad_y)
    ours = run(*call)
    oracle.check(ours, *call, large_mean=True)
    # The mean is carried with its rounding error; rounded to float32 alone it is off by up to 4e-4 deviations.
    assert (ours[0] - in_pytorch(*call)[0]).abs().max() < 1e-5


def test_a_term_in_front_of_a_large_mean_costs_no_digits(run, layout):
    x, weight, bias, add, grad_y = inputs((2, 20, 48, 36), mean=100.0, std=0.01)
    call = (layout(x - add[:, :, None, None]), 2, weight, bias, add, grad_y)
    assert (run(*call)[0] - in_pytorch(*call)[0]).abs().max() < 1e-5


def test_terms_that_cancel_a_large_mean_cost_no_digits(run, layout):
    # x + add is near 0: what is lost is lost where x and add are rounded, in each channel another amount.
    x, weight, bias, add, grad_y = inputs((2, 20, 48, 36))
    add = add * 37 + 100
    call = (layout(x - add[:, :, None, None]), 2, weight, bias, add, grad_y)
    oracle.check(run(*call), *call, large_mean=True)


def test_an_outlier_in_front_does_not_spoil_the_variance(run, layout):
    x, weight, bias, add, grad_y = inputs((1, 4, 80, 81))
    x[:, :, 0, 0] = 1e4
    call = (layout(x), 2, weight, bias, add, grad_y)
    y, _, rstd, *_ = run(*call)
    exact, in_float32 = in_pytorch(*call), in_pytorch(*call, dtype=torch.float32)
    assert ((rstd - exact[2]) / exact[2]).abs().max() < 1e-6
    assert_close_to_exact(y, exact[0], in_float32[0], y.dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_stays_in_its_group(run, layout, bad):
    x, weight, bias, add, grad_y = inputs((2, 24, 30, 28))
    x[1, 10, 2, 3] = bad
    y, _, rstd, grad_x, grad_weight, grad_bias, grad_add = run(layout(x), 3, weight, bias, add, grad_y)
    own = torch.zeros(2, 24, dtype=torch.bool)
    own[1, 8:16] = True
    for name, value in {"y": y.flatten(2), "grad_x": grad_x.flatten(2)}.items():
        assert value[own].isnan().all(), name
        assert value[~own].isfinite().all(), name
    assert torch.equal(grad_add.isfinite(), ~own)
    assert torch.equal(grad_weight.isfinite(), ~own[1])
    assert torch.equal(grad_bias.isfinite(), ~own[1])
    assert torch.equal(rstd.isfinite(), ~own[:, ::8])


def test_nothing_is_read_beside_the_image(run, layout):
    """x is part of a larger image of NaN, also one that starts an element late; all memory is NaN before its use."""
    shape = (2, 24, 30, 28)
    contents, weight, bias, add, grad_y = inputs(shape)
    strided_add = torch.full((4, 48), float("nan"))[:2, ::2].copy_(add)
    views = {
        "fewer channels": layout(torch.full((2, 40, 30, 28), float("nan")))[:, 8:32],
        "an element late": (
            torch.full((contents.numel() + 1,), float("nan"))[1:].view(shape)
            if layout is torch.Tensor.contiguous
            else torch.full((contents.numel() + 1,), float("nan"))[1:].view(2, 30, 28, 24).movedim(-1, 1)
        ),
    }
    for x in views.values():
        x.copy_(contents)
        oracle.check(run(x, 3, weight, bias, strided_add, grad_y), x, 3, weight, bias, add, grad_y)


def test_missing_parameters_are_one_and_zero(run, layout):
    x, weight, bias, add, grad_y = inputs((2, 24, 30, 28))
    named = run(layout(x), 3, torch.ones_like(weight), torch.zeros_like(bias), torch.zeros_like(add), grad_y)
    missing = run(layout(x), 3, None, None, None, grad_y)
    for name, a, b in zip(NAMES, named, missing):
        assert torch.equal(a, b), name


def test_strided_parameters_are_read_by_their_strides(run, layout):
    x, weight, bias, add, grad_y = inputs((2, 24, 30, 28))
    packed = run(layout(x), 3, weight, bias, add, grad_y)
    views = (weight.repeat_interleave(2)[::2], bias.repeat_interleave(3)[1::3], add.T.contiguous().T)
    strided = run(layout(x), 3, *views, grad_y)
    for name, a, b in zip(NAMES, packed, strided):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_order_of_threads_and_blocks_changes_no_bit(run, layout, dtype):
    x, weight, bias, add, grad_y = inputs((2, 48, 26, 27), dtype)
    first, *others = (run(layout(x), 3, weight, bias, add, grad_y, seed=seed) for seed in range(3))
    for other in others:
        for name, a, b in zip(NAMES, first, other):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("shape", [(1, 320, 64, 64), (2, 1280, 8, 8)])
def test_sites_of_a_unet_as_an_h200_would_cut_them(emulator, shape):
    x, weight, bias, add, grad_y = inputs(shape, torch.float16)
    call = (channels_last(x), 32, weight, bias, add, channels_last(grad_y))
    with emulator.on(Device()):
        ours = oracle.run(
            torch.ops.fastdistill.group_norm_silu.cuda, torch.ops.fastdistill.group_norm_silu_backward.cuda, *call
        )
    oracle.check(ours, *call)


def test_a_grid_that_finds_no_room_is_left_to_the_two_passes(emulator):
    full = Device(multiprocessors=40, threads=64, shared_bytes=12 * 1024, clusters=False, cooperative=2)
    call = (x, *_) = inputs((1, 48, 40, 40))
    emulator.launches()
    with emulator.on(full):
        ours = oracle.run(
            torch.ops.fastdistill.group_norm_silu.cuda,
            torch.ops.fastdistill.group_norm_silu_backward.cuda,
            x,
            3,
            *call[1:],
        )
    oracle.check(ours, x, 3, *call[1:])
    assert len(emulator.launches()) == 6
