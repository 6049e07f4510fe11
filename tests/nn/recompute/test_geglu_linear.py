"""geglu_linear: the gradients of the plain composition from fewer kept bytes."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdistill.nn.recompute import geglu_linear
from fastdistill.ops import geglu
from tests.nn.recompute.compositions import (
    assert_equal_bits,
    check_second_derivatives,
    kept,
    leaves_of,
    run,
    under_autocast,
)

module = sys.modules[geglu_linear.__module__]  # the function has its file's name


def plain_linear(x, weight, bias=None):
    return F.linear(geglu(x), weight, bias)


def linear_inputs(dtype=torch.float32, bias=True):
    x, weight = torch.randn(3, 5, 48).to(dtype), (torch.randn(10, 24) / 5).to(dtype)
    return [x, weight, torch.randn(10).to(dtype) if bias else None]


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
    monkeypatch.setattr(module, "geglu", lambda x, **kwargs: calls.append(1) or geglu(x, **kwargs))
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


def test_linear_refuses_what_geglu_and_linear_refuse():
    with pytest.raises(ValueError, match="x: its last dimension must be even"):
        geglu_linear(torch.randn(2, 7), torch.randn(3, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        geglu_linear(torch.randn(2, 8), torch.randn(3, 3, requires_grad=True))
