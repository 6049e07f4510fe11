"""Recompute: the gradients of the plain composition from fewer kept bytes."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdistill.nn import recompute
from fastdistill.nn.recompute import geglu_linear, group_norm_silu_conv2d
from fastdistill.ops import geglu, group_norm_silu

# ---- the two steps and the compositions that they stand for ---------------------------------------------------------


def plain_linear(x, weight, bias=None):
    return F.linear(geglu(x), weight, bias)


def linear_inputs(dtype=torch.float32, bias=True):
    x, weight = torch.randn(3, 5, 48).to(dtype), (torch.randn(10, 24) / 5).to(dtype)
    return [x, weight, torch.randn(10).to(dtype) if bias else None]


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


def leaves_of(inputs, frozen=()):
    return [t if t is None or i in frozen else t.detach().clone().requires_grad_() for i, t in enumerate(inputs)]


def run(function, inputs, frozen=(), **settings):
    """(result, gradients of the inputs that need one)."""
    leaves = leaves_of(inputs, frozen)
    y = function(*leaves, **settings)
    torch.manual_seed(1)
    return y.detach(), torch.autograd.grad(
        y, [t for t in leaves if t is not None and t.requires_grad], torch.randn_like(y)
    )


def assert_equal_bits(ours, plain):
    assert torch.equal(ours[0], plain[0])
    assert len(ours[1]) == len(plain[1])
    for a, b in zip(ours[1], plain[1]):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def kept(function, *inputs, **settings):
    """The bytes of each piece of memory that autograd keeps, those of parameters left out."""
    parameters = {t.untyped_storage()._cdata for t in inputs if isinstance(t, torch.nn.Parameter)}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in parameters:
            found[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*inputs, **settings)  # alive until all are counted, or their memory might be used twice
    del y
    return sorted(found.values())


# ---- geglu -> linear ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_has_the_bits_of_the_plain_composition(dtype, bias):
    inputs = linear_inputs(dtype, bias)
    assert_equal_bits(run(geglu_linear, inputs), run(plain_linear, inputs))


@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 3, 4, 48), (0, 48)])
def test_linear_takes_any_number_of_dimensions(shape):
    inputs = [torch.randn(shape), *linear_inputs()[1:]]
    ours, plain = run(geglu_linear, inputs), run(plain_linear, inputs)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_linear_computes_only_the_gradients_that_are_needed(frozen):
    inputs = linear_inputs()
    assert_equal_bits(run(geglu_linear, inputs, frozen), run(plain_linear, inputs, frozen))


def test_linear_recomputes_the_product_only_for_the_gradient_of_the_weight(monkeypatch):
    calls = []
    monkeypatch.setattr(recompute, "geglu", lambda x, **kwargs: calls.append(1) or geglu(x, **kwargs))
    run(geglu_linear, linear_inputs(), frozen=(1,))
    assert len(calls) == 1, "the forward"
    run(geglu_linear, linear_inputs())
    assert len(calls) == 3, "another forward, and its backward"


def test_linear_keeps_x_alone_where_the_plain_composition_keeps_the_product_too():
    x = torch.randn(16, 48, requires_grad=True)
    weight, bias = torch.nn.Parameter(torch.randn(10, 24)), torch.nn.Parameter(torch.randn(10))
    assert kept(geglu_linear, x, weight, bias) == [x.nbytes]
    assert kept(plain_linear, x, weight, bias) == [x.nbytes // 2, x.nbytes]
    weight.requires_grad_(False)
    assert kept(geglu_linear, x, weight, bias) == [x.nbytes]


def test_linear_keeps_the_same_under_fake_tensors_and_autocast():
    with FakeTensorMode():
        x = torch.empty(4096, 2560, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.nn.Parameter(torch.empty(320, 1280, dtype=torch.bfloat16))
        assert kept(geglu_linear, x, weight) == [4096 * 2560 * 2]
        weight = torch.nn.Parameter(torch.empty(320, 1280))
        with torch.autocast("cpu", torch.bfloat16):
            assert kept(geglu_linear, x, weight) == [4096 * 2560 * 2]
            # The plain composition keeps the product and the weight as autocast has cast it.
            assert kept(plain_linear, x, weight) == [320 * 1280 * 2, 4096 * 1280 * 2, 4096 * 2560 * 2]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_linear_follows_autocast(x_dtype):
    inputs = [linear_inputs(x_dtype)[0], *linear_inputs()[1:]]

    def under_autocast(function):
        def call(*inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*inputs)

        return call

    ours, plain = run(under_autocast(geglu_linear), inputs), run(under_autocast(plain_linear), inputs)
    assert ours[0].dtype == torch.bfloat16
    assert_equal_bits(ours, plain)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_linear_compiles_into_one_graph(backend):
    inputs = linear_inputs()
    compiled = torch.compile(geglu_linear, fullgraph=True, dynamic=True, backend=backend)
    ours, plain = run(compiled, inputs), run(plain_linear, inputs)
    torch.testing.assert_close(ours, plain)


def test_linear_has_second_derivatives():
    inputs = leaves_of(linear_inputs(torch.float64))
    assert torch.autograd.gradcheck(geglu_linear, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(geglu_linear, inputs, fast_mode=True)
    check_second_derivatives(geglu_linear, plain_linear, linear_inputs())
    check_second_derivatives(geglu_linear, plain_linear, linear_inputs(), frozen=(0,))


def check_second_derivatives(ours, plain, inputs, frozen=()):
    def penalty(function):
        leaves = leaves_of(inputs, frozen)
        trained = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad(function(*leaves).square().sum(), trained, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), trained)

    torch.testing.assert_close(penalty(ours), penalty(plain), rtol=1e-4, atol=1e-3)


def test_linear_refuses_what_geglu_and_linear_refuse():
    with pytest.raises(ValueError, match="x: its last dimension must be even"):
        geglu_linear(torch.randn(2, 7), torch.randn(3, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        geglu_linear(torch.randn(2, 8), torch.randn(3, 3, requires_grad=True))


# ---- group_norm_silu -> conv2d --------------------------------------------------------------------------------------


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
        recompute, "group_norm_silu", lambda *args, **kwargs: calls.append(1) or group_norm_silu(*args, **kwargs)
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

    def under_autocast(function):
        def call(*inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*inputs, padding=1)

        return call

    ours, plain = run(under_autocast(ours_conv2d), inputs), run(under_autocast(plain_conv2d), inputs)
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
