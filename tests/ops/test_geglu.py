"""geglu on every backend: numbers against float64, layouts, derivatives, compilation, bad input."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastdistill import _native
from fastdistill.ops import BackendError, explain, geglu
from fastdistill.ops._dispatch import ops
from fastdistill.ops.geglu import _backward, _forward, reference_gradient
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import (
    BACKENDS,
    COMPILED,
    gradients,
    in_every_dtype,
    on_every_backend,
    on_every_kernel,
    truncates,
)

# (..., 2D) with D of 1, 3, 17, 77, 320, 1280 and 5000; one to four dimensions; a single row and many.
SHAPES = [(2,), (5, 6), (2, 3, 34), (2, 2, 3, 154), (7, 640), (3, 2560), (2, 10000)]


def in_pytorch(x):
    """What a user would write, in x's dtype from end to end."""
    h, gate = x.chunk(2, -1)
    return h * F.gelu(gate)


def make(shape, dtype, device="cpu"):
    return torch.randn(shape).to(device, dtype)


def like_result(x):
    return torch.randn((*x.shape[:-1], x.shape[-1] // 2)).to(x.device, x.dtype)


def check_against_exact(backend, device, x, grad_y=None):
    grad_y = like_result(x) if grad_y is None else grad_y
    y, (grad_x,) = gradients(lambda x: geglu(x, backend=backend), [x], grad_y)
    exact_y, (exact,) = gradients(in_pytorch, [x.cpu().double()], grad_y.cpu().double())
    torch_y, (torchs,) = gradients(in_pytorch, [x.cpu()], grad_y.cpu())
    whole_ulp = truncates(backend, device, x.dtype)
    assert_close_to_exact(y.cpu(), exact_y, torch_y, x.dtype, whole_ulp=whole_ulp, what="y")
    assert_close_to_exact(grad_x.cpu(), exact, torchs, x.dtype, whole_ulp=whole_ulp, what="gradient of x")
    assert y.dtype == grad_x.dtype == x.dtype
    if backend != "reference":
        assert y.is_contiguous()
        assert grad_x.stride() == torch.empty_like(x).stride()
    return y, grad_x


@on_every_backend
@in_every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_result_and_gradient_equal_float64(backend, device, shape, dtype):
    check_against_exact(backend, device, make(shape, dtype, device))


@on_every_backend
@in_every_dtype
def test_gates_of_every_size_give_what_float64_gives(backend, device, dtype):
    gate = torch.cat([torch.linspace(-14, 14, 2001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 300.0, -300.0])])
    check_against_exact(backend, device, torch.cat([torch.randn(gate.shape), gate]).to(device, dtype))


@on_every_kernel
def test_a_far_negative_gate_keeps_its_digits(backend, device):
    # 1 + erf(gate / sqrt(2)) in float32 has none left here: PyTorch's own gelu is 0 below -5.6.
    gate = torch.linspace(-12, -1, 4001)
    x = torch.cat([torch.ones_like(gate), gate]).to(device)
    y, (grad_x,) = gradients(lambda x: geglu(x, backend=backend), [x], torch.ones_like(gate).to(device))
    wide = gate.double()
    cdf = 0.5 * torch.erfc(-wide / 2**0.5)
    slope = cdf + wide * torch.exp(-0.5 * wide * wide) / (2 * torch.pi) ** 0.5
    limit = 4e-7 * (2 + wide * wide)  # the exponential's own: its argument is rounded
    assert ((y.cpu() / (wide * cdf) - 1).abs() < limit).all()
    assert torch.equal(y, grad_x[: len(gate)])
    assert ((grad_x[len(gate) :].cpu() - slope).abs() < limit * (slope.abs() + cdf)).all()


@on_every_kernel
@in_every_dtype
def test_infinite_and_nan_inputs_give_what_the_formula_gives(backend, device, dtype):
    # inf at +inf, where torch's vectorised gelu gives NaN on some CPUs; NaN (inf times 0) at -inf, as torch does.
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 3e4, -3e4, 1.0])
    h, gate = (t.flatten().to(dtype) for t in torch.meshgrid(special, special, indexing="ij"))
    x = torch.cat([h, gate]).to(device)
    y, (grad_x,) = gradients(lambda x: geglu(x, backend=backend), [x], torch.ones_like(h).to(device))
    h, gate = h.double(), gate.double()
    cdf, density = torch.special.ndtr(gate), torch.exp(-0.5 * gate * gate) / (2 * torch.pi) ** 0.5
    expected = torch.cat([gate * cdf, h * (cdf + gate * density)])
    torch.testing.assert_close(y.cpu(), (h * (gate * cdf)).to(dtype), equal_nan=True)
    torch.testing.assert_close(grad_x.cpu(), expected.to(dtype), equal_nan=True)


@on_every_kernel
def test_a_bad_value_stays_where_it_is(backend, device):
    x = make((5, 70), torch.float32, device)
    x[2, 3] = float("nan")
    x[3, 35 + 4] = float("nan")
    y, (grad_x,) = gradients(lambda x: geglu(x, backend=backend), [x], like_result(x))
    bad = torch.zeros(5, 35, dtype=torch.bool)
    bad[2, 3] = bad[3, 4] = True
    assert torch.equal(y.isnan().cpu(), bad)
    assert torch.equal(grad_x[:, 35:].isnan().cpu(), bad)
    bad[2, 3] = False  # the gradient of h does not see h
    assert torch.equal(grad_x[:, :35].isnan().cpu(), bad)


@on_every_kernel
@in_every_dtype
@pytest.mark.parametrize("width", [16, 38, 640])
def test_a_view_that_starts_one_element_late_is_read_right(backend, device, dtype, width):
    x = torch.empty(6 * width + 1, device=device, dtype=dtype)[1:].view(6, width)
    x.copy_(torch.randn(6, width))
    grad_y = torch.empty(3 * width + 1, device=device, dtype=dtype)[1:].view(6, width // 2)
    grad_y.copy_(torch.randn(6, width // 2))
    assert explain("geglu", x, backend=backend).backend == backend
    check_against_exact(backend, device, x, grad_y)


VIEWS = {
    "slice of a larger last dimension": lambda t: t[..., 5:29],
    "aligned slice of a larger last dimension": lambda t: t[..., 8:40],
    "every second row": lambda t: t.reshape(6, 48)[::2, :24],
    "one row of many": lambda t: t[1:, 2:, :24],
    "the middle dimension of size one": lambda t: t.reshape(6, 1, 48)[:, :, :24],
}


@on_every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("view", VIEWS)
def test_strided_rows_are_read_in_place(backend, device, view, dtype):
    x = VIEWS[view](make((2, 3, 48), dtype, device))
    assert explain("geglu", x, backend=backend).backend == backend
    check_against_exact(backend, device, x)


ARRIVALS = {
    "slice of a larger last dimension": lambda x, d: torch.randn(*x.shape[:-1], d + 9)[..., 3 : 3 + d],
    "aligned slice": lambda x, d: torch.randn(*x.shape[:-1], d + 16)[..., 8 : 8 + d],
    "one row for all": lambda x, d: torch.randn(d).expand(*x.shape[:-1], d),
    "one value for all": lambda x, d: torch.tensor(0.7).expand(*x.shape[:-1], d),
    "transposed": lambda x, d: torch.randn(x.shape[0], d, x.shape[1]).transpose(1, 2),
    "rows that no single stride walks": lambda x, d: torch.randn(x.shape[0], x.shape[1] + 2, d)[:, 1:-1],
    "batch last": lambda x, d: torch.randn(x.shape[1], x.shape[0], d).transpose(0, 1),
}


@on_every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("arrival", ARRIVALS)
def test_gradient_may_arrive_in_any_layout(backend, device, arrival, dtype):
    x = make((3, 5, 48), dtype, device)
    grad_y = ARRIVALS[arrival](x, 24).to(device, dtype)
    check_against_exact(backend, device, x, grad_y)


@on_every_kernel
@in_every_dtype
def test_large_tensors_cross_every_block_border(backend, device, dtype):
    interpreted = backend == "triton" and device == "cpu"
    for shape in ((5, 2 * 4099), (33, 2 * 1025)) if interpreted else ((7, 2 * 20001), (1025, 2 * 257), (300, 2 * 5120)):
        check_against_exact(backend, device, make(shape, dtype, device))


@on_every_backend
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows_give_an_empty_result_and_gradient(backend, device, shape):
    x = make(shape, torch.float32, device)
    y, (grad_x,) = gradients(lambda x: geglu(x, backend=backend), [x], like_result(x))
    assert y.shape == (*shape[:-1], 4)
    assert grad_x.shape == shape


@on_every_kernel
def test_repeating_a_call_gives_the_same_bits(backend, device):
    x = make((33, 2 * 1025), torch.bfloat16, device)
    grad_y = like_result(x)
    runs = [gradients(lambda x: geglu(x, backend=backend), [x], grad_y) for _ in range(3)]
    for y, (grad_x,) in runs[1:]:
        assert torch.equal(y, runs[0][0])
        assert torch.equal(grad_x, runs[0][1][0])


def test_cpu_result_does_not_depend_on_the_number_of_threads():
    inputs = [make(shape, torch.float32) for shape in ((1, 2 * 100003), (511, 2 * 517))]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs = [gradients(lambda x: geglu(x, backend="cpu"), [x], x.chunk(2, -1)[0]) for x in inputs]
            results.append([t for y, (grad_x,) in runs for t in (y, grad_x)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in results[1:] for a, b in zip(results[0], run))


# ---- derivatives ----------------------------------------------------------------------------------------------------


def test_reference_passes_gradcheck_and_gradgradcheck():
    x = make((3, 2, 10), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(geglu, (x,))
    assert torch.autograd.gradgradcheck(geglu, (x,))


def test_the_gradient_in_pytorch_is_the_reference_s_and_differentiable():
    x = make((3, 10), torch.float64).requires_grad_()
    grad_y = make((3, 5), torch.float64).requires_grad_()
    _, (expected,) = gradients(in_pytorch, [x], grad_y.detach())
    torch.testing.assert_close(reference_gradient(grad_y, x), expected)
    assert torch.autograd.gradcheck(reference_gradient, (grad_y, x))


@on_every_kernel
@in_every_dtype
def test_double_backward_equals_the_reference_in_float64(backend, device, dtype):
    x, direction = make((4, 34), dtype, device), make((4, 17), dtype, device)

    def penalty_gradients(function, x, direction):
        x, direction = x.detach().requires_grad_(), direction.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(x), x, direction, create_graph=True)
        return torch.autograd.grad((first * first).sum(), (x, direction))

    ours = penalty_gradients(lambda x: geglu(x, backend=backend), x, direction)
    exact = penalty_gradients(in_pytorch, x.cpu().double(), direction.cpu().double())
    torchs = penalty_gradients(in_pytorch, x.cpu(), direction.cpu())
    for name, a, b, c in zip(("x", "grad_y"), ours, exact, torchs):
        assert_close_to_exact(a.cpu(), b, c, dtype, what=f"second derivative by {name}")


def test_third_derivative_goes_through():
    x = make((2, 12), torch.float32).requires_grad_()

    def third(x):
        (g,) = torch.autograd.grad(geglu(x).sum(), x, create_graph=True)
        (g,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    torch.testing.assert_close(third(x).double(), third(x.detach().double().requires_grad_()), rtol=1e-4, atol=1e-4)


@on_every_kernel
def test_only_the_input_is_saved(backend, device):
    x = make((4, 32), torch.bfloat16, device).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        geglu(x, backend=backend)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


# ---- the frameworks around it ---------------------------------------------------------------------------------------


@on_every_kernel
@pytest.mark.parametrize("view", ["dense", "sliced"])
def test_raw_ops_pass_opcheck(backend, device, view):
    x = make((2, 3, 48), torch.float32, device)
    x = x if view == "dense" else x[..., 7:31]
    geglu(x, backend=backend)  # loads the library
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_forward(backend), (x,), test_utils=tests)
    torch.library.opcheck(_backward(backend), (like_result(x), x), test_utils=tests)


@pytest.mark.parametrize(("backend", "device"), COMPILED)
def test_compiles_into_one_graph_with_dynamic_shapes(backend, device):
    def function(x):
        return geglu(x * 1.0, backend=backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, width in ((4, 16), (7, 22), (9, 6)):
        x = make((2, rows, width), torch.float32, device)
        grad_y = like_result(x)
        ours, (ours_grad,) = gradients(compiled, [x], grad_y)
        plain, (plain_grad,) = gradients(function, [x], grad_y)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(ours_grad, plain_grad)


@pytest.mark.parametrize(("backend", "device"), [b for b in BACKENDS if b.id in ("cpu", "triton", "cuda")])
def test_the_compiled_backward_is_the_kernel_s(backend, device):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    called = set()

    def collect(graph, _):
        called.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    x = make((4, 16), torch.float32, device).requires_grad_()
    compiled = torch.compile(
        lambda x: geglu(x, backend=backend), fullgraph=True, backend=aot_autograd(fw_compiler=collect)
    )
    compiled(x).backward(like_result(x))
    assert {f"fastdistill.geglu.{backend}", f"fastdistill.geglu_backward.{backend}"} <= called


@pytest.mark.parametrize(("backend", "device"), [b for b in BACKENDS if b.id in ("cpu", "triton", "cuda")])
def test_compiles_with_the_default_compiler(backend, device):
    x = make((6, 34), torch.float32, device)
    compiled = torch.compile(lambda x: torch.relu(geglu(x + 1, backend=backend)), fullgraph=True)
    torch.testing.assert_close(compiled(x), torch.relu(geglu(x + 1, backend=backend)))


@on_every_backend
def test_autocast_keeps_the_dtype_of_x(backend, device):
    for dtype in (torch.float32, torch.float16):
        x = make((3, 34), dtype, device)
        with torch.autocast(device, dtype=torch.bfloat16):
            y = geglu(x, backend=backend)
        assert y.dtype == dtype
        assert torch.equal(y, geglu(x, backend=backend))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_is_captured_in_a_cuda_graph(backend):
    x, grad_y = make((77, 2560), torch.float16, "cuda"), make((77, 1280), torch.float16, "cuda")
    geglu(x, backend=backend)  # loads the library, or compiles
    forward, backward = _forward(backend), _backward(backend)
    backward(grad_y, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grad_x = forward(x), backward(grad_y, x)
    x.copy_(torch.randn_like(x))
    grad_y.copy_(torch.randn_like(grad_y))
    graph.replay()
    assert torch.equal(y, forward(x))
    assert torch.equal(grad_x, backward(grad_y, x))


# ---- which backend serves -------------------------------------------------------------------------------------------


def test_explain_names_the_choice_and_every_reason():
    explanation = explain("geglu", torch.randn(4, 8))
    assert explanation.backend == "cpu"
    assert explanation.reasons["cpu"] == []
    assert explanation.reasons["cuda"] == ["needs a CUDA tensor, got cpu"]
    assert list(explanation.reasons) == [b.name for b in ops()["geglu"].backends]
    assert explain("geglu", x=torch.randn(4, 8)) == explanation


UNREADABLE = {
    "float64": (lambda: torch.randn(4, 8, dtype=torch.float64), "float64"),
    "every other column": (lambda: torch.randn(4, 16)[:, ::2], "strides"),
    "transposed": (lambda: torch.randn(8, 4).t(), "strides"),
    "expanded rows": (lambda: torch.randn(8).expand(4, 8), "strides"),
    "overlapping rows": (lambda: torch.randn(32).as_strided((4, 8), (4, 1)), "strides"),
    "rows that no single stride walks": (lambda: torch.randn(2, 5, 8)[:, 1:4], "strides"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_no_kernel_reads_is_served_by_the_reference(case):
    make_x, reason = UNREADABLE[case]
    x = make_x()
    explanation = explain("geglu", x)
    assert explanation.backend == "reference"
    assert any(reason in text for text in explanation.reasons["cpu"])
    torch.testing.assert_close(geglu(x).double(), in_pytorch(x.double()), rtol=1e-5, atol=1e-5)


def test_forcing_a_backend_that_cannot_serve_raises_with_its_reasons(monkeypatch):
    x = torch.randn(4, 8)
    with pytest.raises(
        BackendError, match="geglu: backend 'cuda' cannot serve this call: needs a CUDA tensor, got cpu"
    ):
        geglu(x, backend="cuda")
    with pytest.raises(BackendError, match="geglu has no backend 'cudnn'; it has: cuda, triton, cpu, reference"):
        geglu(x, backend="cudnn")
    with pytest.raises(BackendError, match=r"'cpu' cannot serve this call: strides \(1, 4\): needs dense rows"):
        geglu(torch.randn(8, 4).t(), backend="cpu")
    monkeypatch.setenv("FASTDISTILL_BACKEND", "geglu=cuda,group_norm_silu=reference")
    with pytest.raises(BackendError, match="'cuda' cannot serve"):
        geglu(x)


@pytest.mark.parametrize("capability", _native.CPU_CAPABILITIES[:-1])
def test_lower_instruction_sets_pass_the_same_tests(capability):
    environment = {**os.environ, "FASTDISTILL_CPU_CAPABILITY": capability}
    selection = "cpu and (equal_float64 or every_size or digits or nan_inputs or one_element_late or border)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k"]
    run = subprocess.run([*command, f"{selection} and not reference"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "x: expected a tensor, got list"),
        (torch.tensor(1.0), ValueError, r"x: expected \(\.\.\., 2D\) with at least one dimension"),
        (torch.ones(2, 7), ValueError, r"x: its last dimension must be even and at least 2, got shape \(2, 7\)"),
        (torch.ones(2, 0), ValueError, r"x: its last dimension must be even and at least 2, got shape \(2, 0\)"),
        (torch.ones(2, 4, dtype=torch.int32), TypeError, "x: expected float32, .* got torch.int32"),
        (torch.ones(2, 4, dtype=torch.complex64), TypeError, "x: expected float32, .* got torch.complex64"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_input_names_the_argument_the_value_and_the_need(x, error, message, backend):
    with pytest.raises(error, match=message):
        geglu(x, backend=backend)
    with pytest.raises(error, match=message):
        explain("geglu", x)
