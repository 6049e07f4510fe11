"""group_norm_silu_conv2d: the gradients of the plain composition from fewer kept bytes."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdistill.nn.recompute import group_norm_silu_conv2d
from fastdistill.ops import group_norm_silu
from tests.nn.recompute.compositions import (
    assert_equal_bits,
    check_second_derivatives,
    kept,
    leaves_of,
    run,
    under_autocast,
)

module = sys.modules[group_norm_silu_conv2d.__module__]  # the function has its file's name


CONVOLUTIONS = {
    "3x3": {"padding": 1},
    "strided": {"stride": 2, "padding": (1, 0)},
    "dilated": {"dilation": (1, 2), "padding": 2},
    "grouped": {"groups": 2, "padding": 1},
}


def convolution(function):
    """A function of the tensors alone, for one of the compositions below."""

    def call(x, norm_weight, norm_bias, add, conv_weight, conv_bias, silu=True, **settings):
        return function(x, 4, norm_weight, norm_bias, 1e-5, conv_weight, conv_bias, silu=silu, add=add, **settings)

    return call


def _plain_conv2d(x, num_groups, norm_weight, norm_bias, eps, conv_weight, conv_bias, *, silu, add, **settings):
    return F.conv2d(
        group_norm_silu(x, num_groups, norm_weight, norm_bias, eps, silu=silu, add=add),
        conv_weight,
        conv_bias,
        **settings,
    )


ours_conv2d, plain_conv2d = convolution(group_norm_silu_conv2d), convolution(_plain_conv2d)


def conv_inputs(dtype=torch.float32, groups=1, channels_last=False):
    x = torch.randn(2, 8, 6, 5).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    conv_weight, conv_bias = (torch.randn(6, 8 // groups, 3, 3) / 5).to(dtype), torch.randn(6).to(dtype)
    norm_weight, norm_bias, add = (torch.randn(size).to(dtype) for size in (8, 8, (2, 8)))
    return [x, norm_weight + 1, norm_bias, add, conv_weight, conv_bias]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_convolution_has_the_bits_of_the_plain_composition(dtype, channels_last):
    inputs = conv_inputs(dtype, channels_last=channels_last)
    ours, plain = run(ours_conv2d, inputs, padding=1), run(plain_conv2d, inputs, padding=1)
    assert ours[1][0].stride() == inputs[0].stride()
    assert_equal_bits(ours, plain)


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_convolution_takes_the_settings_of_conv2d(settings):
    settings = CONVOLUTIONS[settings]
    inputs = conv_inputs(groups=settings.get("groups", 1))
    ours, plain = run(ours_conv2d, inputs, **settings), run(plain_conv2d, inputs, **settings)
    assert_equal_bits(ours, plain)


@pytest.mark.parametrize("absent", [(1, 2), (3,), (5,), (1, 2, 3, 5)])
@pytest.mark.parametrize("silu", [True, False])
def test_convolution_does_without_optional_tensors(absent, silu):
    inputs = [None if i in absent else t for i, t in enumerate(conv_inputs())]
    assert_equal_bits(run(ours_conv2d, inputs, silu=silu), run(plain_conv2d, inputs, silu=silu))


@pytest.mark.parametrize("frozen", [(0, 1, 2, 3), (4,), (4, 5), (0,), (1, 2, 4, 5), (5,)])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_convolution_computes_only_the_gradients_that_are_needed(frozen, channels_last):
    inputs = conv_inputs(channels_last=channels_last)
    ours = run(ours_conv2d, inputs, frozen, padding=1)
    assert_equal_bits(ours, run(plain_conv2d, inputs, frozen, padding=1))


def test_convolution_recomputes_its_input_only_for_the_gradient_of_the_weight(monkeypatch):
    calls = []
    monkeypatch.setattr(
        module, "group_norm_silu", lambda *args, **kwargs: calls.append(1) or group_norm_silu(*args, **kwargs)
    )
    run(ours_conv2d, conv_inputs(), frozen=(4,))
    assert not calls
    run(ours_conv2d, conv_inputs())
    assert len(calls) == 1


@pytest.mark.parametrize("frozen_weight", [False, True])
def test_convolution_keeps_x_and_the_statistics_where_the_plain_composition_keeps_its_input_too(frozen_weight):
    x = torch.randn(2, 8, 6, 5, requires_grad=True)
    norm_weight, norm_bias = torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.zeros(8))
    conv_weight = torch.nn.Parameter(torch.randn(6, 8, 3, 3), requires_grad=not frozen_weight)
    inputs = (x, norm_weight, norm_bias, None, conv_weight, None)
    statistics = 2 * 4 * 4
    assert kept(ours_conv2d, *inputs) == [statistics, statistics, x.nbytes]
    assert kept(plain_conv2d, *inputs) == [statistics, statistics, x.nbytes, x.nbytes]


def test_convolution_keeps_the_same_under_fake_tensors_and_autocast():
    with FakeTensorMode():
        x = torch.empty(4, 320, 64, 64, dtype=torch.bfloat16, requires_grad=True)
        norm_weight, norm_bias = torch.nn.Parameter(torch.ones(320)), torch.nn.Parameter(torch.zeros(320))
        inputs = (x, norm_weight, norm_bias, None, torch.nn.Parameter(torch.empty(320, 320, 3, 3)), None)
        with torch.autocast("cpu", torch.bfloat16):
            assert kept(ours_conv2d, *inputs) == [4 * 4 * 4, 4 * 4 * 4, x.nbytes]


def test_convolution_follows_autocast():
    inputs = conv_inputs()

    ours, plain = (run(under_autocast(f), inputs, padding=1) for f in (ours_conv2d, plain_conv2d))
    assert ours[0].dtype == torch.bfloat16
    assert_equal_bits(ours, plain)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_convolution_compiles_into_one_graph(backend):
    inputs = conv_inputs()
    compiled = torch.compile(ours_conv2d, fullgraph=True, dynamic=True, backend=backend)
    torch.testing.assert_close(run(compiled, inputs, padding=1), run(plain_conv2d, inputs, padding=1))


def test_convolution_has_second_derivatives():
    inputs = leaves_of(conv_inputs(torch.float64))
    assert torch.autograd.gradcheck(ours_conv2d, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours_conv2d, inputs, fast_mode=True)
    check_second_derivatives(ours_conv2d, plain_conv2d, conv_inputs())
    check_second_derivatives(ours_conv2d, plain_conv2d, conv_inputs(), frozen=(4,))


def test_convolution_of_no_images_is_empty():
    inputs = [torch.randn(0, 8, 6, 5), *conv_inputs()[1:3], None, *conv_inputs()[4:]]
    y, grads = run(ours_conv2d, inputs)
    assert y.shape == (0, 6, 4, 3)
    assert all(g.eq(0).all() for g in grads)


def test_convolution_refuses_what_it_cannot_serve():
    x, norm_weight, norm_bias, _, conv_weight, conv_bias = conv_inputs()
    arguments = (norm_weight, norm_bias, 1e-5, conv_weight, conv_bias)
    with pytest.raises(ValueError, match=r"num_groups: must .* divide the 8 channels of x, got 3"):
        group_norm_silu_conv2d(x, 3, *arguments)
    with pytest.raises(ValueError, match=r"x: expected \(N, C, H, W\), got shape \(2, 8, 30\)"):
        group_norm_silu_conv2d(x.flatten(2), 4, *arguments)
    with pytest.raises(TypeError, match="padding: expected an int or a pair of them, got 'same'"):
        group_norm_silu_conv2d(x, 4, *arguments, padding="same")
