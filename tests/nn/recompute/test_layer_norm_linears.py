"""layer_norm_linears: the gradients of the plain composition from fewer kept bytes."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdistill.nn.recompute import layer_norm_linears
from fastdistill.ops import layer_norm
from tests.nn.recompute.compositions import check_second_derivatives, kept, leaves_of, run, under_autocast

module = sys.modules[layer_norm_linears.__module__]  # the function has its file's name


def joined(function):
    """Of tensors alone; all results side by side, so that each takes part in the gradients."""

    def call(x, residual, norm_weight, norm_bias, *weights_and_biases):
        half = len(weights_and_biases) // 2
        linears = weights_and_biases[:half], weights_and_biases[half:]
        return torch.cat(function(x, norm_weight, norm_bias, 1e-5, *linears, residual=residual), dim=-1)

    return call


def plain(x, norm_weight, norm_bias, eps, weights, biases, *, residual=None):
    y = layer_norm(x, norm_weight, norm_bias, eps, residual=residual)
    y, *s = (y,) if residual is None else y
    return *(F.linear(y, weight, bias) for weight, bias in zip(weights, biases)), *s


ours_joined, plain_joined = joined(layer_norm_linears), joined(plain)


def inputs_of(dtype=torch.float32, residual=True, count=3, bias=True):
    x = torch.randn(2, 5, 24)
    tensors = [x, torch.randn_like(x) if residual else None, torch.randn(24) + 1, torch.randn(24)]
    tensors += [torch.randn(8 + i, 24) / 5 for i in range(count)]
    tensors += [torch.randn(8 + i) if bias else None for i in range(count)]
    return [None if t is None else t.to(dtype) for t in tensors]


def assert_close(ours, theirs, dtype):
    """The result to the bit; gradients to the order in which those of several layers are added up."""
    assert torch.equal(ours[0], theirs[0])
    rtol, atol = {torch.bfloat16: (2e-2, 5e-2)}.get(dtype, (1e-5, 1e-5))
    assert [g.dtype for g in ours[1]] == [g.dtype for g in theirs[1]]
    torch.testing.assert_close(ours[1], theirs[1], rtol=rtol, atol=atol)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("count", "bias"), [(1, True), (3, False), (3, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_has_the_numbers_of_the_plain_composition(dtype, count, bias, residual):
    inputs = inputs_of(dtype, residual, count, bias)
    assert_close(run(ours_joined, inputs), run(plain_joined, inputs), dtype)


@pytest.mark.parametrize("frozen", [(0, 1), (2, 3), (4, 5), (4, 5, 6), (7, 8, 9), (0, 1, 2, 3), (2, 5, 9)])
def test_computes_only_the_gradients_that_are_needed(frozen):
    inputs = inputs_of()
    assert_close(run(ours_joined, inputs, frozen), run(plain_joined, inputs, frozen), torch.float32)


@pytest.mark.parametrize("used", [(0,), (1, 2), (3,), (0, 3)])
def test_results_that_take_no_part_have_no_gradient(used):
    def choose(function):
        def call(x, residual, norm_weight, norm_bias, *linears):
            results = function(x, norm_weight, norm_bias, 1e-5, linears[:3], linears[3:], residual=residual)
            return torch.cat([results[i] for i in used], dim=-1)

        return call

    def gradients(function):
        leaves = leaves_of(inputs_of_seed())
        return torch.autograd.grad(choose(function)(*leaves).square().sum(), leaves, allow_unused=True)

    def inputs_of_seed():
        torch.manual_seed(3)
        return inputs_of()

    for ours, theirs in zip(gradients(layer_norm_linears), gradients(plain)):
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours, theirs)


def test_keeps_the_sum_and_its_statistics_where_the_plain_composition_keeps_the_layers_input_too():
    x, residual = (torch.randn(16, 24, requires_grad=True) for _ in range(2))
    parameters = [torch.nn.Parameter(t) for t in inputs_of()[2:]]
    statistics = 16 * 4
    assert kept(ours_joined, x, residual, *parameters) == [statistics, statistics, x.nbytes]
    assert kept(plain_joined, x, residual, *parameters) == [statistics, statistics, x.nbytes, x.nbytes]


def test_keeps_the_same_under_fake_tensors_and_autocast():
    with FakeTensorMode():
        x = torch.empty(4096, 320, dtype=torch.bfloat16, requires_grad=True)
        parameters = [torch.nn.Parameter(torch.empty(size)) for size in ((320,), (320,), (320, 320), (320,))]
        with torch.autocast("cpu", torch.bfloat16):
            assert kept(ours_joined, x, None, *parameters) == [4096 * 4, 4096 * 4, x.nbytes]


def test_runs_the_norm_again_once_for_all_layers_and_only_for_the_gradients_of_weights(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "layer_norm", lambda *args, **kwargs: calls.append(1) or layer_norm(*args, **kwargs))
    run(ours_joined, inputs_of())
    assert len(calls) == 1
    run(ours_joined, inputs_of(), frozen=(4, 5, 6))
    assert len(calls) == 2, "the forward: nothing is kept that would have to be computed again"


def test_follows_autocast():
    inputs = inputs_of()
    ours, theirs = (run(under_autocast(f), inputs) for f in (ours_joined, plain_joined))
    assert_close(ours, theirs, torch.bfloat16)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend):
    inputs = inputs_of()
    compiled = torch.compile(ours_joined, fullgraph=True, dynamic=True, backend=backend)
    torch.testing.assert_close(run(compiled, inputs), run(plain_joined, inputs))


def test_has_second_derivatives():
    inputs = leaves_of(inputs_of(torch.float64, count=2))
    assert torch.autograd.gradcheck(ours_joined, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours_joined, inputs, fast_mode=True)
    check_second_derivatives(ours_joined, plain_joined, inputs_of())


def test_refuses_what_it_cannot_serve():
    x, _, norm_weight, norm_bias, *linears = inputs_of()
    with pytest.raises(ValueError, match=r"biases: expected 3, one \(or None\) per weight, got 2"):
        layer_norm_linears(x, norm_weight, norm_bias, 1e-5, linears[:3], linears[3:5])
    with pytest.raises(ValueError, match="weight: expected shape"):
        layer_norm_linears(x, norm_weight[1:], norm_bias, 1e-5, linears[:3], linears[3:])
