"""layer_norm on every backend: numbers against float64, rows in memory, derivatives, compilation, bad input."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastdistill import _native
from fastdistill.nn import LayerNorm
from fastdistill.ops import BackendError, explain, layer_norm
from fastdistill.ops._dispatch import ops
from fastdistill.ops.layer_norm import _backward, _forward
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import BACKENDS, COMPILED, in_every_dtype, on_every_backend, on_every_kernel, truncates

# Rows of 1, of a part of a vector, of the UNets' widths; every number of dimensions. The last ones leave the kernels
# that hold a row in the registers of a warp, or of a block.
SHAPES = [
    (5,),
    (4, 1),
    (2, 3, 3),
    (7, 17),
    (1, 2, 2, 3, 77),
    (2, 37, 320),
    (3, 5, 640),
    (2, 9, 1280),
    (6, 2048),
    (3, 5000),
]
LARGE_SHAPES = [(2, 17000), (2, 20001)]
WITH_RESIDUAL = pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])


def affordable(width, backend, device):
    """The width, or one that the interpreter affords: tests/kernels lowers its limits instead."""
    return min(width, 6200) if (backend, device) == ("triton", "cpu") else width


def make(shape, dtype, device, mean=0.0, std=1.0, with_residual=False, parameter_dtype=None):
    """x, residual (or None), weight, bias."""
    parameter_dtype = parameter_dtype or dtype
    x = (torch.randn(shape) * std + mean).to(device, dtype)
    residual = (torch.randn(shape) * std + mean).to(device, dtype) if with_residual else None
    weight = (torch.randn(shape[-1]) + 1).to(device, parameter_dtype)
    bias = torch.randn(shape[-1]).to(device, parameter_dtype)
    return x, residual, weight, bias


def in_dtype(x, residual, weight, bias, eps, dtype):
    """(y, s) as a user would write it in PyTorch, in `dtype` from end to end; s rounded to x's dtype first."""
    s = x if residual is None else x + residual
    s, weight, bias = (None if t is None else t.to(dtype) for t in (s, weight, bias))
    return F.layer_norm(s, s.shape[-1:], weight, bias, eps), s


def run(function, inputs, grad_y, grad_s):
    """y, s and the gradients of every input, with (grad_y, grad_s) as the gradients of (y, s); grad_s may be None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y, s = function(*leaves)
    present = [t for t in leaves if t is not None]
    if grad_s is None:
        found = torch.autograd.grad(y, present, grad_y.to(y.dtype))
    else:
        found = torch.autograd.grad((y, s), present, (grad_y.to(y.dtype), grad_s.to(s.dtype)))
    return y.detach(), s.detach(), found


def ours(backend, eps=1e-5):
    def function(x, residual, weight, bias):
        result = layer_norm(x, weight, bias, eps, residual=residual, backend=backend)
        return (result, x) if residual is None else result

    return function


def check_against_exact(
    backend, device, x, residual, weight, bias, grad_y=None, grad_s="random", eps=1e-5, large_mean=False
):
    dtype = x.dtype
    grad_y = torch.randn(x.shape).to(device, dtype) if grad_y is None else grad_y
    if isinstance(grad_s, str):
        grad_s = None if residual is None else torch.randn(x.shape).to(device, dtype)
    inputs = (x, residual, weight, bias)
    y, s, grads = run(ours(backend, eps), inputs, grad_y, grad_s)

    def exactly(dtype):
        # From the rounded sum on, like the op; its gradient is that of either summand.
        sum_ = x if residual is None else x + residual
        s, w, b, gy, gs = (None if t is None else t.to("cpu", dtype) for t in (sum_, weight, bias, grad_y, grad_s))
        y, s, (grad_x, *rest) = run(lambda s, w, b: in_dtype(s, None, w, b, eps, dtype), (s, w, b), gy, gs)
        return y, s, (grad_x, *([] if residual is None else [grad_x]), *rest)

    exact_y, exact_s, exact = exactly(torch.float64)
    torch_y, _, torchs = exactly(dtype)
    settings = {"large_mean": large_mean, "whole_ulp": truncates(backend, device, dtype)}
    assert_close_to_exact(y.cpu(), exact_y, torch_y, dtype, **settings, what="y")
    if residual is not None and not settings["whole_ulp"]:
        assert torch.equal(s.cpu().double(), exact_s), "the sum is rounded as x + residual is"
    names = [n for n, t in zip(("x", "residual", "weight", "bias"), inputs) if t is not None]
    for name, ours_, exact_, torch_ in zip(names, grads, exact, torchs):
        assert_close_to_exact(ours_.cpu(), exact_, torch_, dtype, **settings, what=f"gradient of {name}")
    assert y.stride() == torch.empty_like(x).stride(), "layout in = layout out"
    if residual is not None:
        assert torch.equal(grads[0], grads[1]), "x and residual have one gradient"
        assert s.stride() == torch.empty_like(x).stride()
    if backend != "reference":
        assert grads[0].stride() == torch.empty_like(x).stride()
    return y


@on_every_backend
@WITH_RESIDUAL
@pytest.mark.parametrize("shape", SHAPES, ids=lambda v: "x".join(map(str, v)))
@in_every_dtype
def test_result_and_gradients_equal_float64(backend, device, shape, dtype, with_residual):
    check_against_exact(backend, device, *make(shape, dtype, device, with_residual=with_residual))


@on_every_backend
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=lambda v: "x".join(map(str, v)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_too_long_for_registers_equal_float64(backend, device, shape, dtype):
    shape = shape[0], affordable(shape[1], backend, device)
    check_against_exact(backend, device, *make(shape, dtype, device, with_residual=True))


@on_every_backend
@WITH_RESIDUAL
@pytest.mark.parametrize("present", ["none", "weight", "bias"])
@pytest.mark.parametrize("width", [48, 1300])
def test_every_optional_argument_can_be_left_out(backend, device, present, with_residual, width):
    x, residual, weight, bias = make((2, 7, width), torch.float32, device, with_residual=with_residual)
    weight, bias = weight if present == "weight" else None, bias if present == "bias" else None
    check_against_exact(backend, device, x, residual, weight, bias)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_may_be_float32_beside_16_bit_input(backend, device, dtype):
    x, residual, weight, bias = make((5, 48), dtype, device, with_residual=True, parameter_dtype=torch.float32)
    y, s, grads = run(ours(backend), (x, residual, weight, bias), x, x)
    assert y.dtype == s.dtype == dtype
    assert [g.dtype for g in grads] == [dtype, dtype, torch.float32, torch.float32]
    check_against_exact(backend, device, x, residual, weight, bias)
    check_against_exact(backend, device, x, residual, weight, bias.to(dtype))


@on_every_backend
@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [(torch.float32, 100.0, 0.01), (torch.float16, 30.0, 0.5), (torch.bfloat16, 30.0, 0.5)],
    ids=["float32", "float16", "bfloat16"],
)
@pytest.mark.parametrize("width", [320, 2560, 17000])
def test_a_mean_far_above_the_deviation_keeps_its_digits(backend, device, dtype, mean, std, width):
    width = affordable(width, backend, device)
    x, _, weight, bias = make((6, width), dtype, device, mean, std)
    y = check_against_exact(backend, device, x, None, weight, bias, large_mean=True)
    if backend != "reference" and dtype == torch.float32:
        exact = in_dtype(x.cpu(), None, weight.cpu(), bias.cpu(), 1e-5, torch.float64)[0]
        # A mean of 100 rounded to float32 is off by up to 4e-6, which is 4e-4 deviations.
        assert (y.cpu() - exact).abs().max() < 2e-5


@on_every_kernel
@pytest.mark.parametrize("width", [320, 2560, 17000])
def test_gradients_keep_their_digits_beside_a_large_mean(backend, device, width):
    width = affordable(width, backend, device)
    x, _, weight, bias = make((6, width), torch.float32, device, 100.0, 0.01)
    grad_y = torch.randn(6, width, device=device)
    _, _, grads = run(ours(backend), (x, None, weight, bias), grad_y, None)
    wide = [t.double().cpu() for t in (x, weight, bias)]
    _, _, exact = run(lambda x, w, b: in_dtype(x, None, w, b, 1e-5, torch.float64), wide, grad_y.cpu(), None)
    for ours_, exact_ in zip(grads, exact):
        assert (ours_.cpu() - exact_).abs().max() < 2e-5 * exact_.abs().max()


@on_every_backend
@pytest.mark.parametrize("width", [64, 2560, 17000])
def test_first_value_far_from_the_rest_does_not_spoil_the_variance(backend, device, width):
    width = affordable(width, backend, device)
    x, _, weight, bias = make((3, width), torch.float32, device)
    x[:, 0] = 1000.0
    check_against_exact(backend, device, x, None, weight, bias)


@on_every_backend
@in_every_dtype
def test_constant_rows_give_the_bias_and_finite_gradients(backend, device, dtype):
    _, _, weight, bias = make((4, 72), dtype, device)
    x = torch.full((4, 72), 3.0, device=device, dtype=dtype)
    y, _, grads = run(ours(backend), (x, None, weight, bias), torch.randn_like(x), None)
    # The mean's last place, times rstd = 1/sqrt(eps) = 316.
    torch.testing.assert_close(y, bias.expand_as(y), rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in grads)


@on_every_kernel
def test_rows_of_one_value_have_no_gradient(backend, device):
    x, _, weight, bias = make((9, 1), torch.float32, device)
    y, _, (grad_x, grad_weight, _) = run(ours(backend), (x, None, weight, bias), torch.randn_like(x), None)
    assert torch.equal(y, bias.expand_as(y))
    assert grad_x.eq(0).all()
    assert grad_weight.eq(0).all()


# ---- rows in memory -------------------------------------------------------------------------------------------------


@on_every_kernel
@in_every_dtype
@pytest.mark.parametrize("width", [64, 320, 1280, 2560])
def test_a_view_that_starts_one_element_late_is_read_right(backend, device, dtype, width):
    x, residual, weight, bias = make((5, width), dtype, device, with_residual=True)
    late = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (x, residual, weight, bias)]
    check_against_exact(backend, device, late[0], residual, weight, bias)
    check_against_exact(backend, device, *late)


@on_every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_in_place_from_a_larger_tensor(backend, device, dtype):
    packed = torch.randn(2, 11, 3 * 96, device=device).to(dtype)
    _, _, weight, bias = make((2, 11, 96), dtype, device)
    for x in (packed[..., :96], packed[..., 96:192], packed[:, ::2, 5:101][:1], packed[..., 7:40:1]):
        width = x.shape[-1]
        assert explain("layer_norm", x, backend=backend).backend == backend
        check_against_exact(backend, device, x, None, weight[:width], bias[:width])
        check_against_exact(backend, device, x, torch.randn_like(x), weight[:width], bias[:width])
    # x dense, the residual strided or one row for all.
    x = packed[..., :96].contiguous()
    check_against_exact(backend, device, x, packed[..., 96:192], weight, bias)
    check_against_exact(backend, device, x, packed[:1, :1, :96].expand(2, 11, 96), weight, bias)


@on_every_kernel
def test_tokens_of_a_channels_last_image_are_dense_rows(backend, device):
    image = torch.randn(2, 48, 5, 4, device=device).to(memory_format=torch.channels_last)
    tokens = image.permute(0, 2, 3, 1).reshape(2, 20, 48)
    assert tokens.data_ptr() == image.data_ptr()
    assert explain("layer_norm", tokens, backend=backend).backend == backend
    check_against_exact(backend, device, tokens, None, None, None)


@on_every_kernel
def test_parameters_may_be_strided(backend, device):
    x, _, weight, bias = make((5, 48), torch.float32, device)
    strided = weight.repeat_interleave(2)[::2], bias.repeat_interleave(3)[1::3]
    plain = run(ours(backend), (x, None, weight, bias), x, None)
    other = layer_norm(x, *strided, backend=backend)
    assert torch.equal(plain[0], other)
    grad_weight = torch.autograd.grad(
        layer_norm(x, strided[0].requires_grad_(), bias, backend=backend), strided[0], x.contiguous()
    )[0]
    assert torch.equal(grad_weight, plain[2][1])
    grad_x = torch.autograd.grad(layer_norm(x.requires_grad_(), strided[0], bias, backend=backend), x, x.detach())[0]
    assert torch.equal(grad_x, plain[2][0])


@on_every_kernel
@pytest.mark.parametrize("arrival", ["one row for all", "wider rows", "late", "expanded", "transposed", "sliced"])
@pytest.mark.parametrize("which", ["grad_y", "grad_s"])
def test_gradients_may_arrive_in_any_strides(backend, device, arrival, which):
    x, residual, weight, bias = make((2, 6, 48), torch.float32, device, with_residual=True)
    gradient = {
        "one row for all": torch.randn(48, device=device).expand(x.shape),
        "wider rows": torch.randn(2, 6, 60, device=device)[..., 3:51],
        "late": torch.randn(2 * 6 * 48 + 1, device=device)[1:].view(2, 6, 48),
        # No kernel reads these.
        "expanded": torch.tensor(0.7, device=device).expand(x.shape),
        "transposed": torch.randn(2, 48, 6, device=device).transpose(1, 2),
        "sliced": torch.randn(2, 8, 48, device=device)[:, 1:7],
    }[arrival]
    check_against_exact(backend, device, x, residual, weight, bias, **{which: gradient})


@on_every_kernel
def test_many_rows_cross_every_block_border(backend, device):
    rows = 100 if device == "cpu" and backend == "triton" else 5000
    for width in (24, 400):
        check_against_exact(backend, device, *make((rows + 3, width), torch.float32, device, with_residual=True))


@on_every_backend
@WITH_RESIDUAL
def test_no_rows_give_an_empty_result_and_zero_gradients(backend, device, with_residual):
    x, residual, weight, bias = make((0, 3, 8), torch.float32, device, with_residual=with_residual)
    y, s, grads = run(ours(backend), (x, residual, weight, bias), x, x if with_residual else None)
    assert y.shape == s.shape == x.shape
    assert all(g.shape == x.shape for g in grads[:-2])
    assert grads[-2].shape == grads[-1].shape == (8,)
    assert not grads[-2].any()
    assert not grads[-1].any()


@on_every_kernel
@pytest.mark.parametrize("width", [40, 1300, 17000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_stays_in_its_row(backend, device, width, bad):
    width = affordable(width, backend, device)
    x = torch.randn(6, width, device=device)
    x[2, 7] = bad
    weight = torch.ones(width, device=device)
    y, _, (grad_x, _) = run(ours(backend), (x, None, weight, None), torch.randn_like(x), None)
    for value in (y, grad_x):
        assert value[2].isnan().all()
        assert value[[0, 1, 3, 4, 5]].isfinite().all()


# ---- the gradient of the sum ----------------------------------------------------------------------------------------


@on_every_backend
def test_only_the_sum_may_have_a_gradient(backend, device):
    x, residual, weight, bias = (t.requires_grad_() for t in make((4, 24), torch.float32, device, with_residual=True))
    _, s = layer_norm(x, weight, bias, residual=residual, backend=backend)
    grad_s = torch.randn_like(s)
    grad_x, grad_residual, grad_weight = torch.autograd.grad(s, (x, residual, weight), grad_s, allow_unused=True)
    assert torch.equal(grad_x, grad_s)
    assert torch.equal(grad_residual, grad_s)
    assert grad_weight is None


@on_every_backend
@pytest.mark.parametrize("leaf", range(4), ids=["x", "residual", "weight", "bias"])
def test_each_input_alone_may_need_a_gradient(backend, device, leaf):
    tensors = make((7, 40), torch.float32, device, with_residual=True)
    grad_y = torch.randn(7, 40, device=device)
    *_, together = run(ours(backend), tensors, grad_y, None)
    tensors[leaf].requires_grad_()
    (alone,) = torch.autograd.grad(ours(backend)(*tensors)[0], tensors[leaf], grad_y)
    assert torch.equal(alone, together[leaf])


@on_every_kernel
def test_the_norm_and_the_sum_feed_a_residual_block(backend, device):
    # What a transformer block does: h = h + block(norm(h)), twice.
    x, residual, weight, bias = make((3, 5, 32), torch.float32, device, with_residual=True)

    def block(norm):
        def function(x, residual, weight, bias):
            y, s = norm(x, residual, weight, bias)
            y, s = norm(torch.tanh(y), s, weight, bias)
            return y * s, s

        return function

    grads = (torch.randn_like(x), torch.randn_like(x))
    y, s, found = run(block(ours(backend)), (x, residual, weight, bias), *grads)
    wide = [t.double().cpu() for t in (x, residual, weight, bias)]
    plain = block(lambda x, r, w, b: in_dtype(x, r, w, b, 1e-5, x.dtype))
    exact_y, exact_s, exact = run(plain, wide, *(g.cpu() for g in grads))
    torch.testing.assert_close(y.cpu().double(), exact_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(s.cpu().double(), exact_s, rtol=1e-5, atol=1e-5)
    for ours_, exact_ in zip(found, exact):
        torch.testing.assert_close(ours_.cpu().double(), exact_, rtol=1e-4, atol=1e-4)


@on_every_kernel
def test_only_the_sum_the_weight_and_the_statistics_are_saved(backend, device):
    x, residual, weight, bias = (t.requires_grad_() for t in make((6, 32), torch.bfloat16, device, with_residual=True))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, s = layer_norm(x, weight, bias, residual=residual, backend=backend)
        with_residual, saved = saved, []
    assert [(tuple(t.shape), t.dtype) for t in with_residual] == [
        ((6, 32), torch.bfloat16),
        ((32,), torch.bfloat16),
        ((6,), torch.float32),
        ((6,), torch.float32),
    ]
    assert with_residual[0].data_ptr() == s.data_ptr()


# ---- determinism ----------------------------------------------------------------------------------------------------


@on_every_kernel
@pytest.mark.parametrize("width", [40, 1300])
def test_repeating_a_call_gives_the_same_bits(backend, device, width):
    tensors = make((23, width), torch.bfloat16, device, with_residual=True)
    grads = torch.randn(23, width, device=device), torch.randn(23, width, device=device)
    runs = []
    for _ in range(3):
        y, s, found = run(ours(backend), tensors, *grads)
        runs.append((y, s, *found))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))


def test_cpu_result_does_not_depend_on_the_number_of_threads():
    tensors = make((1501, 136), torch.float32, "cpu", with_residual=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, s, grads = run(ours("cpu"), tensors, tensors[0], tensors[1])
            results.append((y, s, *grads))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


# ---- higher derivatives ---------------------------------------------------------------------------------------------


@WITH_RESIDUAL
@pytest.mark.parametrize("affine", [True, False])
def test_reference_passes_gradcheck_and_gradgradcheck(with_residual, affine):
    tensors = make((2, 3, 5), torch.float64, "cpu", with_residual=with_residual)
    inputs = [t.requires_grad_() for t in (tensors if affine else tensors[:2]) if t is not None]

    def function(x, *rest):
        rest = list(rest)
        residual = rest.pop(0) if with_residual else None
        return layer_norm(x, *rest, residual=residual)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@on_every_kernel
@WITH_RESIDUAL
def test_double_backward_equals_the_reference_in_float64(backend, device, with_residual):
    x, residual, weight, bias = make((3, 4, 20), torch.float32, device, with_residual=with_residual)
    directions = torch.randn_like(x), torch.randn_like(x)

    def penalty_gradients(function, *inputs):
        leaves = [t.detach().requires_grad_() for t in inputs if t is not None]
        y, s = function(*(leaves if with_residual else (leaves[0], None, *leaves[1:])))
        outputs, seeds = ((y, s), directions) if with_residual else ((y,), directions[:1])
        seeds = [t.to(y.device, y.dtype) for t in seeds]
        first = torch.autograd.grad(outputs, leaves, seeds, create_graph=True)
        # Every first derivative takes part, so every second one is seen.
        penalty = sum((g * g * (i + 1)).sum() for i, g in enumerate(first))
        return torch.autograd.grad(penalty, leaves, allow_unused=True)

    found = penalty_gradients(ours(backend), x, residual, weight, bias)
    narrow = [None if t is None else t.cpu() for t in (x, residual, weight, bias)]
    wide = [None if t is None else t.double() for t in narrow]
    exact = penalty_gradients(lambda x, r, w, b: in_dtype(x, r, w, b, 1e-5, torch.float64), *wide)
    torchs = penalty_gradients(lambda x, r, w, b: in_dtype(x, r, w, b, 1e-5, torch.float32), *narrow)
    assert found[-1] is None or not found[-1].any()
    assert sum(g is not None for g in exact) >= len(found) - 1
    for a, b, c in zip(found[:-1], exact, torchs):
        assert_close_to_exact(a.cpu(), b, c, torch.float32, what="second derivative")


@on_every_kernel
def test_a_penalty_on_the_input_gradient_trains_the_weight(backend, device):
    # The R1 pattern: only x needs the first gradient, only the weight the second.
    x, _, weight, bias = make((5, 24), torch.float32, device)
    x.requires_grad_()
    weight.requires_grad_()
    direction = torch.randn_like(x)
    (g,) = torch.autograd.grad(layer_norm(x, weight, bias, backend=backend), x, direction, create_graph=True)
    (found,) = torch.autograd.grad(g.square().sum(), weight)
    xd, wd, bd, d = (t.detach().double().cpu().requires_grad_() for t in (x, weight, bias, direction))
    (g,) = torch.autograd.grad(F.layer_norm(xd, (24,), wd, bd), xd, d, create_graph=True)
    (exact,) = torch.autograd.grad(g.square().sum(), wd)
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-4, atol=1e-5)


def test_third_derivative_goes_through():
    x, residual = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    xd = x.detach().double().requires_grad_()

    def third(x, residual):
        y, _ = layer_norm(x, residual=residual)
        (g,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (g,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    exact = third(xd, residual.double())
    torch.testing.assert_close(third(x, residual).double(), exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


# ---- the frameworks around it ---------------------------------------------------------------------------------------


@on_every_kernel
@pytest.mark.parametrize("optional", [True, False])
def test_raw_ops_pass_opcheck(backend, device, optional):
    x, residual, weight, bias = make((2, 5, 24), torch.float32, device, with_residual=True)
    if not optional:
        residual = weight = bias = None
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_forward(backend), (x, residual, weight, bias, 1e-5), test_utils=tests)
    _, s, mean, rstd = _forward(backend)(x, residual, weight, bias, 1e-5)
    s = s if optional else x
    arguments = (torch.randn_like(x), torch.randn_like(x) if optional else None, s, weight, mean, rstd, optional)
    torch.library.opcheck(_backward(backend), arguments, test_utils=tests)


@pytest.mark.parametrize(("backend", "device"), COMPILED)
@WITH_RESIDUAL
def test_compiles_into_one_graph_with_dynamic_shapes(backend, device, with_residual):
    def function(x, residual, weight, bias):
        y, s = ours(backend)(x * 1.0, residual, weight, bias)
        return y, s * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 7, 9):
        tensors = make((2, rows, rows + 16), torch.float32, device, with_residual=with_residual)
        grads = torch.randn_like(tensors[0]), torch.randn_like(tensors[0])
        found, plain = run(compiled, tensors, *grads), run(function, tensors, *grads)
        for a, b in zip((*found[:2], *found[2]), (*plain[:2], *plain[2])):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("backend", "device"), [b for b in COMPILED if b.id != "reference"])
def test_compiles_with_the_default_compiler(backend, device):
    x, residual, weight, bias = make((2, 6, 24), torch.float32, device, with_residual=True)

    def function(x):
        y, s = layer_norm(x + 1, weight, bias, residual=residual, backend=backend)
        return torch.relu(y) + s

    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), function(x))


@on_every_backend
def test_autocast_keeps_the_dtype_of_x(backend, device):
    x, residual, weight, bias = make((5, 24), torch.bfloat16, device, with_residual=True, parameter_dtype=torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, s = layer_norm(x, weight, bias, residual=residual, backend=backend)
    assert y.dtype == s.dtype == torch.bfloat16
    assert torch.equal(y, layer_norm(x, weight, bias, residual=residual, backend=backend)[0])
    with torch.autocast(device, dtype=torch.bfloat16):
        assert layer_norm(x.float(), weight, bias, backend=backend).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_forward_and_backward_are_captured_in_a_cuda_graph(backend):
    tensors = make((2, 256, 640), torch.float16, "cuda", with_residual=True)
    leaves = [t.requires_grad_() for t in tensors]
    grads = torch.randn_like(tensors[0]), torch.randn_like(tensors[0])

    def step():
        outputs = ours(backend)(*leaves)
        return *outputs, *torch.autograd.grad(outputs, leaves, grads)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in leaves:
            t.copy_(torch.randn_like(t))
    graph.replay()
    for a, b in zip(captured, step()):
        assert torch.equal(a, b)


# ---- the module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_the_module_is_a_drop_in_for_torchs(affine):
    torchs = torch.nn.LayerNorm(40, eps=1e-6, **affine)
    for p in torchs.parameters():
        torch.nn.init.normal_(p)
    module = LayerNorm(40, eps=1e-6, **affine)
    module.load_state_dict(torchs.state_dict())
    assert repr(module) == repr(torchs)
    x, residual = torch.randn(3, 5, 40), torch.randn(3, 5, 40)
    torch.testing.assert_close(module(x), torchs(x))
    y, s = module(x, residual)
    torch.testing.assert_close(y, torchs(x + residual))
    assert torch.equal(s, x + residual)


def test_a_module_made_from_torchs_shares_its_parameters():
    torchs = torch.nn.LayerNorm(40, eps=1e-3).eval()
    module = LayerNorm.from_layer_norm(torchs, backend="reference")
    assert module.weight is torchs.weight
    assert module.bias is torchs.bias
    assert list(module.state_dict()) == list(torchs.state_dict())
    assert (module.eps, module.training, module.backend) == (1e-3, False, "reference")
    x = torch.randn(2, 40)
    assert torch.equal(module(x), torchs(x))


def test_the_module_refuses_several_normalised_dimensions():
    with pytest.raises(ValueError, match=r"normalized_shape: expected one dimension, got \(4, 8\)"):
        LayerNorm((4, 8))
    with pytest.raises(ValueError, match=r"normalized_shape: expected one dimension, got \(4, 8\)"):
        LayerNorm.from_layer_norm(torch.nn.LayerNorm((4, 8)))


# ---- which backend serves -------------------------------------------------------------------------------------------


def test_explain_names_the_choice_and_every_reason():
    explanation = explain("layer_norm", torch.randn(2, 8))
    assert explanation.backend == "cpu"
    assert explanation.reasons["cpu"] == []
    assert explanation.reasons["cuda"] == ["needs a CUDA tensor, got cpu"]
    assert list(explanation.reasons) == [b.name for b in ops()["layer_norm"].backends]
    assert explain("layer_norm", x=torch.randn(2, 8)) == explanation


@pytest.mark.parametrize(
    ("x", "residual", "reason"),
    [
        (torch.randn(3, 8, dtype=torch.float64), None, "float64"),
        (torch.randn(3, 16)[:, ::2], None, "strides (16, 2)"),
        (torch.randn(8, 3).T, None, "strides (1, 3)"),
        (torch.randn(4, 3, 8).transpose(0, 1), None, "strides (8, 24, 1)"),
        (torch.randn(8).expand(3, 8), None, "strides (0, 1)"),
        (torch.randn(20).as_strided((3, 8), (4, 1)), None, "strides (4, 1)"),
        (torch.randn(3, 8), torch.randn(8, 3).T, "residual's strides (1, 3)"),
    ],
    ids=["float64", "every other", "transposed", "rows permuted", "one row expanded", "overlapping", "residual"],
)
def test_what_no_kernel_reads_is_served_by_the_reference(x, residual, reason):
    explanation = explain("layer_norm", x, residual=residual)
    assert explanation.backend == "reference"
    assert any(reason in text for text in explanation.reasons["cpu"])
    y, s = ours(None)(x, residual, None, None)
    exact_y, exact_s = in_dtype(x, residual, None, None, 1e-5, torch.float64)
    torch.testing.assert_close(y.double(), exact_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(s.double(), exact_s, rtol=1e-6, atol=1e-6)


def test_forcing_a_backend_that_cannot_serve_raises_with_its_reasons(monkeypatch):
    x = torch.randn(2, 8)
    with pytest.raises(BackendError, match="'cuda' cannot serve this call: needs a CUDA tensor, got cpu"):
        layer_norm(x, backend="cuda")
    with pytest.raises(BackendError, match="layer_norm has no backend 'apex'; it has: cuda, triton, cpu, reference"):
        layer_norm(x, backend="apex")
    monkeypatch.setenv("FASTDISTILL_BACKEND", "cuda,layer_norm=reference")
    assert explain("layer_norm", x).backend == "reference"
    assert explain("layer_norm", x, backend="cpu").backend == "cpu"


@pytest.mark.parametrize("capability", _native.CPU_CAPABILITIES[:-1])
def test_lower_instruction_sets_pass_the_same_tests(capability):
    environment = {**os.environ, "FASTDISTILL_CPU_CAPABILITY": capability}
    selection = "cpu and (float64 or digits or variance or late or border or bad_value or threads) and not reference"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", selection]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected .* at least one dimension"),
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, TypeError, "x: expected float32, .* got torch.int32"),
        ({"x": torch.ones(2, 8, dtype=torch.complex64)}, TypeError, "x: expected float32, .* got torch.complex64"),
        ({"x": torch.ones(2, 0)}, ValueError, "x: needs at least one value to normalise over, got shape (2, 0)"),
        ({"eps": float("nan")}, ValueError, "eps: expected a finite number >= 0, got nan"),
        ({"eps": float("inf")}, ValueError, "eps: expected a finite number >= 0, got inf"),
        ({"eps": -1e-5}, ValueError, "eps: expected a finite number >= 0, got -1e-05"),
        ({"eps": "1e-5"}, TypeError, "eps: expected a float, got str"),
        ({"weight": torch.ones(4)}, ValueError, "weight: expected shape (8,), got (4,)"),
        ({"weight": 1.0}, TypeError, "weight: expected a tensor or None, got float"),
        ({"weight": torch.ones(8, dtype=torch.float16)}, TypeError, "weight: expected x's dtype torch.float32 or"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "weight: expected on x's device cpu, got meta"),
        ({"bias": torch.ones(8, 1)}, ValueError, "bias: expected shape (8,), got (8, 1)"),
        ({"bias": torch.ones(8, dtype=torch.float64)}, TypeError, "bias: expected x's dtype"),
        ({"residual": torch.ones(8)}, ValueError, "residual: expected shape (2, 8), got (8,)"),
        ({"residual": torch.ones(2, 8).half()}, TypeError, "residual: expected x's dtype torch.float32, got"),
        ({"residual": torch.ones(2, 8, device="meta")}, ValueError, "residual: expected on x's device cpu, got meta"),
        ({"residual": 0.0}, TypeError, "residual: expected a tensor or None, got float"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_input_names_the_argument_the_value_and_the_need(change, error, message, backend):
    message = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(error, match=message):
        layer_norm(**{"x": torch.ones(2, 8), **change}, backend=backend)


def test_a_16_bit_input_refuses_a_float32_residual():
    with pytest.raises(TypeError, match=r"residual: expected x's dtype torch.float16, got torch.float32"):
        layer_norm(torch.ones(2, 8).half(), residual=torch.ones(2, 8))


def test_no_backend_is_called_with_bad_input(monkeypatch):
    monkeypatch.setattr(sys.modules["fastdistill.ops.layer_norm"], "_forward", None)
    with pytest.raises(ValueError, match="weight: expected shape"):
        layer_norm(torch.ones(2, 8), torch.ones(3), backend="cpu")


def test_every_backend_of_the_op_is_tested():
    assert {b.values[0] for b in BACKENDS} == {b.name for b in ops()["layer_norm"].backends}
