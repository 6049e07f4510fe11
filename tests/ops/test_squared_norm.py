"""squared_norm on every backend: numbers against float64, layouts, derivatives, compilation, bad input."""

import pytest
import torch

from fastdistill.ops import BackendError, explain, squared_norm
from fastdistill.ops.squared_norm import _forward, gradient, reference
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import BACKENDS, in_every_dtype

HERE = [b for b in BACKENDS if b.id in ("cpu", "reference", "cuda")]
on_every_backend = pytest.mark.parametrize(("backend", "device"), HERE)
on_every_kernel = pytest.mark.parametrize(("backend", "device"), [b for b in HERE if b.id != "reference"])

# Of a sample: an image, features of a head, one value, a video, a scalar per sample.
SHAPES = [(4, 65, 63), (384, 37), (1, 1, 1), (3, 5, 7, 9), ()]


def in_pytorch(tensors):
    return sum(t.square().flatten(1).sum(1) if t.dim() > 1 else t.square() for t in tensors)


def make(batch, shapes, dtype, device="cpu"):
    return [torch.randn(batch, *shape).to(device, dtype) for shape in shapes]


def with_gradients(function, tensors, seed):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(leaves)
    return y.detach(), torch.autograd.grad(y, leaves, seed.to(y.device, y.dtype))


def check_against_exact(backend, tensors):
    seed = torch.randn(tensors[0].shape[0])
    y, grads = with_gradients(lambda t: squared_norm(t, backend=backend), tensors, seed)
    exact, exact_grads = with_gradients(in_pytorch, [t.cpu().double() for t in tensors], seed)
    torchs, torch_grads = with_gradients(in_pytorch, [t.cpu().float() for t in tensors], seed)
    assert y.dtype == torch.float32
    assert_close_to_exact(y.cpu(), exact, torchs, torch.float32, what="norm")
    for t, ours, a, b in zip(tensors, grads, exact_grads, torch_grads, strict=True):
        assert_close_to_exact(ours.cpu(), a, b.to(t.dtype), t.dtype, what="gradient")
        assert ours.dtype == t.dtype
    return y, grads


@on_every_backend
@in_every_dtype
@pytest.mark.parametrize("batch", [1, 3])
def test_norm_and_gradients_equal_float64(backend, device, batch, dtype):
    check_against_exact(backend, make(batch, SHAPES, dtype, device))
    check_against_exact(backend, make(batch, SHAPES[2:3], dtype, device))


@on_every_kernel
def test_tensors_may_differ_in_dtype(backend, device):
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    check_against_exact(backend, [make(2, [(7, 9)], dtype, device)[0] for dtype in dtypes])


@on_every_kernel
@in_every_dtype
def test_samples_dense_in_any_order_are_read_in_place(backend, device, dtype):
    views = [
        torch.randn(1 + 4 * 33).to(device, dtype)[1:].view(4, 33),  # one element late
        torch.randn(4, 8, 5, 3).to(device, dtype, memory_format=torch.channels_last),
        torch.randn(8, 64).to(device, dtype)[::2],  # every second sample
        torch.randn(4, 80).to(device, dtype)[:, 8:72],  # a slice of larger samples
        torch.randn(4, 6, 7).to(device, dtype).transpose(1, 2),
    ]
    assert explain("squared_norm", views, backend=backend).backend == backend
    check_against_exact(backend, views)
    for view in views:
        check_against_exact(backend, [view])


@on_every_kernel
def test_more_tensors_than_one_launch_takes(backend, device):
    check_against_exact(backend, make(3, [(1 + i % 7,) for i in range(150)], torch.float32, device))


@on_every_backend
def test_a_tensor_is_a_list_of_one(backend, device):
    (x,) = make(3, [(4, 5)], torch.float32, device)
    assert torch.equal(squared_norm(x, backend=backend), squared_norm([x], backend=backend))


@on_every_backend
def test_no_samples_and_no_elements(backend, device):
    y, (grad,) = with_gradients(
        lambda t: squared_norm(t, backend=backend), [torch.zeros(0, 4, device=device)], torch.ones(0)
    )
    assert y.shape == (0,)
    assert grad.shape == (0, 4)
    y = squared_norm([torch.zeros(3, 0, device=device), torch.ones(3, 2, device=device)], backend=backend)
    assert y.tolist() == [2.0, 2.0, 2.0]
    assert squared_norm([torch.zeros(3, 0, device=device)], backend=backend).tolist() == [0.0, 0.0, 0.0]


@on_every_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_that_16_bits_cannot_hold_are_summed(backend, device, dtype):
    x = torch.full((2, 70_000), 1e4).to(device, dtype)
    expected = x.cpu().double().square().sum(1)
    torch.testing.assert_close(squared_norm(x, backend=backend).cpu().double(), expected, rtol=1e-5, atol=0)


@on_every_kernel
def test_a_bad_value_stays_in_its_sample(backend, device):
    x, y = make(4, [(70, 3), (5,)], torch.float32, device)
    x[1, 3, 2], y[2, 4] = float("nan"), float("inf")
    found = squared_norm([x, y], backend=backend).cpu()
    assert found.isnan().tolist() == [False, True, False, False]
    assert found.isinf().tolist() == [False, False, True, False]


@on_every_kernel
def test_repeating_a_call_gives_the_same_bits(backend, device):
    tensors = make(3, [(40_001,), (7, 5)], torch.float32, device)
    assert torch.equal(squared_norm(tensors, backend=backend), squared_norm(tensors, backend=backend))


def test_cpu_result_does_not_depend_on_the_number_of_threads():
    tensors, before = make(5, [(40_001,), (33,), (20_000,)], torch.float32), torch.get_num_threads()
    try:
        results = [(torch.set_num_threads(n), squared_norm(tensors, backend="cpu"))[1] for n in (1, 2, 5)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- derivatives ----------------------------------------------------------------------------------------------------


def test_derivatives_of_the_formula_pass_gradcheck_and_gradgradcheck():
    tensors = [t.requires_grad_() for t in make(3, [(2, 2), (), (1,)], torch.float64)]
    seed = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: reference(t), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: reference(t), tensors)
    torch.testing.assert_close(
        tuple(gradient(seed, tensors)), torch.autograd.grad(reference(tensors), tensors, seed.detach())
    )
    assert torch.autograd.gradcheck(lambda s, *t: gradient(s, t), (seed, *tensors))
    assert torch.autograd.gradgradcheck(lambda s, *t: gradient(s, t), (seed, *tensors))


@on_every_kernel
def test_second_and_third_derivatives_equal_the_reference_in_float64(backend, device):
    def derivatives(x, y, backend):
        x, y = x.requires_grad_(), y.requires_grad_()
        norm = squared_norm([x * y, x.sin()], backend=backend)
        first = torch.autograd.grad(norm.square().sum(), (x, y), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, y), create_graph=True)
        return *second, *torch.autograd.grad(sum(g.square().sum() for g in second), (x, y))

    x, y = make(3, [(2, 5), (2, 5)], torch.float32)
    ours = derivatives(x.to(device), y.to(device), backend)
    for a, b in zip(ours, derivatives(x.double(), y.double(), "reference")):
        torch.testing.assert_close(a.cpu().double() / b.abs().max(), b / b.abs().max(), rtol=0, atol=1e-5)


@on_every_kernel
def test_only_the_tensors_are_saved(backend, device):
    tensors = [t.requires_grad_() for t in make(3, [(4, 5), (6,)], torch.bfloat16, device)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        squared_norm(tensors, backend=backend)
    assert saved == [t.data_ptr() for t in tensors]


# ---- the frameworks around it ---------------------------------------------------------------------------------------


@on_every_kernel
def test_the_raw_op_passes_opcheck(backend, device):
    tensors = make(3, [(4, 5), (6,)], torch.float32, device)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_forward(backend), ([*tensors, tensors[0].half().transpose(1, 2)],), test_utils=tests)


@on_every_backend
def test_compiles_into_one_graph_with_its_gradient(backend, device):
    def penalty(a, b):
        return squared_norm([a * 2, b], backend=backend).mean()

    a, b = (t.requires_grad_() for t in make(3, [(4, 5), (6,)], torch.float32, device))
    ours, plain = torch.compile(penalty, fullgraph=True, backend="aot_eager")(a, b), penalty(a, b)
    torch.testing.assert_close(ours, plain)
    for x, y in zip(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(plain, (a, b))):
        torch.testing.assert_close(x, y)


@on_every_backend
def test_autocast_leaves_the_norm_in_float32(backend, device):
    x = make(2, [(3, 4)], torch.float16, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = squared_norm(x, backend=backend)
    assert y.dtype == torch.float32
    assert torch.equal(y, squared_norm(x, backend=backend))


@pytest.mark.gpu
def test_is_captured_in_a_cuda_graph():
    tensors = make(3, SHAPES, torch.float16, "cuda")
    forward = _forward("cuda")
    forward(tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(tensors)
    for t in tensors:
        t.copy_(torch.randn_like(t))
    graph.replay()
    assert torch.equal(captured, forward(tensors))


# ---- which backend serves, bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.randn(3, 4, dtype=torch.float64), "float64"),
        (torch.randn(3, 8)[:, ::2], r"tensors\[1\] has strides \(8, 2\)"),
        (torch.randn(4).expand(3, 4), "strides"),
    ],
)
def test_what_no_kernel_reads_is_served_by_the_reference(x, reason):
    tensors = [torch.randn(3, 2), x]
    with pytest.raises(BackendError, match=reason):
        squared_norm(tensors, backend="cpu")
    assert explain("squared_norm", tensors).backend == "reference"
    torch.testing.assert_close(squared_norm(tensors).double(), in_pytorch([t.double() for t in tensors]))


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (3.0, TypeError, "tensors: expected a tensor or a list of tensors, got float"),
        ([], ValueError, "tensors: expected at least one, got none"),
        ([torch.ones(2), None], TypeError, r"tensors\[1\]: expected a tensor, got NoneType"),
        ([torch.ones(2).long()], TypeError, r"tensors\[0\]: expected float32, .* got torch.int64"),
        ([torch.ones(2, 3), torch.ones(3, 3)], ValueError, r"tensors\[1\]: expected .*\(2,\), got shape \(3, 3\)"),
        (torch.tensor(1.0), ValueError, r"tensors\[0\]: expected \(B, \.\.\.\)"),
        ([torch.ones(2), torch.ones(2, device="meta")], ValueError, r"tensors\[1\] is on meta, the first on cpu"),
    ],
)
def test_bad_input_names_the_argument_the_value_and_the_need(tensors, error, message):
    with pytest.raises(error, match=message):
        squared_norm(tensors)
