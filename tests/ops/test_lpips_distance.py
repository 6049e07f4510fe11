"""lpips_distance on every backend: numbers against float64, layouts, extremes, derivatives, compilation, bad input."""

import os
import subprocess
import sys

import pytest
import torch

from fastdistill import _native
from fastdistill.ops import BackendError, explain, lpips_distance
from fastdistill.ops.lpips_distance import _backward, _forward, reference
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import BACKENDS, COMPILED, in_every_dtype, on_every_backend, on_every_kernel, truncates

# A single value; C of 1, 3, 4, 5, 63 and more than a tile; S of 1; tokens (B, C, L), video, no trailing dimension.
SHAPES = [
    (1, 1, 1, 1),
    (3, 4, 65, 63),
    (2, 63, 5, 7),
    (1, 512, 4, 4),
    (2, 3, 300),
    (2, 5, 3, 4, 5),
    (3, 70),
    (2, 1, 9, 9),
]


def in_pytorch(x, y, weight):
    """What the public package computes, in x's dtype from end to end."""

    def unit(t):
        return t / ((t * t).sum(1, keepdim=True).sqrt() + 1e-10)

    squares = (unit(x) - unit(y)) ** 2
    weighted = squares * weight.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 2))
    return weighted.sum(1).reshape(x.shape[0], -1).mean(1)


def make(shape, dtype, device="cpu", layout="contiguous"):
    """Positive and negative features; channels last where the layout says so."""
    if layout == "contiguous":
        return torch.randn(shape).to(device, dtype)
    return torch.randn(shape[0], *shape[2:], shape[1]).to(device, dtype).movedim(-1, 1)


def call(function, inputs, grad):
    """Distance and the three gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    distance = function(*leaves)
    return (distance.detach(), *torch.autograd.grad(distance, leaves, grad.to(distance.dtype)))


def check_against_exact(backend, device, x, y, weight=None):
    weight = torch.rand(x.shape[1], device=device) if weight is None else weight
    grad = torch.randn(x.shape[0], device=device)
    ours = call(lambda *t: lpips_distance(*t, backend=backend), (x, y, weight), grad)
    exact = call(in_pytorch, [t.cpu().double() for t in (x, y, weight)], grad.cpu())
    torchs = call(in_pytorch, [t.cpu() for t in (x, y, weight)], grad.cpu())
    names = ("distance", "gradient of x", "gradient of y", "gradient of weight")
    for name, a, b, c in zip(names, ours, exact, torchs):
        # What float32 arithmetic and one rounding give, whatever PyTorch's own 16-bit errors are.
        c, dtype = (c, x.dtype) if name.endswith(("x", "y")) else (b, torch.float32)
        assert_close_to_exact(a.cpu(), b, c, dtype, whole_ulp=truncates(backend, device, dtype), what=name)
    assert ours[0].dtype == torch.float32
    for gradient, t in zip(ours[1:3], (x, y)):
        assert gradient.dtype == t.dtype
        assert backend == "reference" or gradient.stride() == torch.empty_like(t).stride()
    return ours


@on_every_backend
@in_every_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_distance_and_gradients_equal_float64(backend, device, shape, layout, dtype):
    if (backend, device) == ("triton", "cpu") and shape == (3, 4, 65, 63):
        shape = (1, 4, 5, 63)  # the interpreter takes seconds for the whole
    x, y = (make(shape, dtype, device, layout) for _ in range(2))
    if backend != "reference":
        assert explain("lpips_distance", x, y, torch.ones(shape[1], device=device), backend=backend).backend == backend
    check_against_exact(backend, device, x, y)


@on_every_kernel
@in_every_dtype
def test_x_and_y_may_each_lie_in_its_own_layout(backend, device, dtype):
    x, y = make((2, 37, 9, 11), dtype, device), make((2, 37, 9, 11), dtype, device, "channels last")
    check_against_exact(backend, device, x, y)
    check_against_exact(backend, device, y, x)


VIEWS = {
    "one element late": lambda t: torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view_as(t).copy_(t),
    "every second sample": lambda t: torch.cat([t, t + 1])[::2],
    "some of more channels": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "some of more channels, last": lambda t: torch.cat([t, t], 1).movedim(1, -1).contiguous()[..., 3:15].movedim(-1, 1),
    "one sample for all": lambda t: t[:1].expand(t.shape),
}


@on_every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_in_place(backend, device, view, dtype):
    x = VIEWS[view](make((4, 12, 8, 8), dtype, device))
    y = make(x.shape, dtype, device)
    assert explain("lpips_distance", x, y, torch.ones(12, device=device), backend=backend).backend == backend
    check_against_exact(backend, device, x, y)
    check_against_exact(backend, device, y, x)


@on_every_backend
def test_layers_of_different_sizes_add_up(backend, device):
    shapes = [(2, 8, 9, 9), (2, 16, 4, 4), (2, 5, 3)]
    xs, ys = ([make(s, torch.float32, device) for s in shapes] for _ in range(2))
    weights = [torch.rand(1, s[1], *(1,) * (len(s) - 2), device=device) for s in shapes]
    together = lpips_distance(xs, ys, weights, backend=backend)
    apart = [lpips_distance(x, y, w.flatten(), backend=backend) for x, y, w in zip(xs, ys, weights)]
    torch.testing.assert_close(together, sum(apart))
    torch.testing.assert_close(lpips_distance(xs[:1], ys[:1], weights[:1], backend=backend), apart[0])
    exact = sum(in_pytorch(x.cpu().double(), y.cpu().double(), w.cpu()) for x, y, w in zip(xs, ys, weights))
    assert_close_to_exact(together.cpu(), exact, exact, torch.float32)


@on_every_backend
def test_no_samples_give_an_empty_distance_and_zero_weight_gradients(backend, device):
    x, weight = (
        torch.randn(0, 4, 3, 3, device=device, requires_grad=True),
        torch.ones(4, device=device).requires_grad_(),
    )
    distance = lpips_distance(x, x.detach(), weight, backend=backend)
    grad_x, grad_weight = torch.autograd.grad(distance.sum(), (x, weight))
    assert distance.shape == (0,)
    assert grad_x.shape == x.shape
    assert torch.equal(grad_weight, torch.zeros_like(weight))


# ---- extremes -------------------------------------------------------------------------------------------------------


@on_every_backend
@in_every_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_equal_features_are_at_distance_0_with_gradient_0(backend, device, layout, dtype):
    x, weight = make((2, 19, 6, 7), dtype, device, layout), torch.rand(19, device=device)
    ones = torch.ones(2, device=device)
    distance, *gradients = call(lambda *t: lpips_distance(*t, backend=backend), (x, x.clone(), weight), ones)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in (distance, *gradients))


@on_every_backend
@in_every_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_feature_vector_of_zeros_has_gradient_0_and_disturbs_no_other(backend, device, layout, dtype):
    x, y = (make((2, 6, 5, 5), dtype, device, layout) for _ in range(2))
    x[0, :, 1, 2] = 0
    y[0, :, 3, 3] = 0
    x[1, :, 0, 0] = y[1, :, 0, 0] = 0
    weight, grad = torch.rand(6, device=device), torch.randn(2, device=device)
    distance, grad_x, grad_y, grad_weight = call(lambda *t: lpips_distance(*t, backend=backend), (x, y, weight), grad)
    assert not grad_x[0, :, 1, 2].any()
    assert not grad_y[0, :, 3, 3].any()
    # What the formula gives elsewhere does not depend on how small a vector there is, as long as it is not zero.
    leaves = [t.cpu().double() for t in (x, y, weight)]
    tiny = torch.zeros_like(leaves[0])
    tiny[0, :, 1, 2] = tiny[1, :, 0, 0] = 1e-30
    tiny_y = torch.zeros_like(tiny)
    tiny_y[0, :, 3, 3] = tiny_y[1, :, 0, 0] = 1e-30
    exact = call(in_pytorch, [leaves[0] + tiny, leaves[1] + tiny_y, leaves[2]], grad.cpu())
    elsewhere = (tiny + tiny_y) == 0
    floor = {"atol": 2e-6, "rtol": 0} if dtype == torch.float32 else {"atol": torch.finfo(dtype).eps, "rtol": 0}
    for ours, theirs in zip((grad_x, grad_y), exact[1:3]):
        keep = elsewhere.to(theirs.dtype)
        torch.testing.assert_close(ours.cpu().double() * keep, theirs * keep, **floor)
    for ours, theirs in zip((distance, grad_weight), (exact[0], exact[3])):
        torch.testing.assert_close(ours.cpu().double(), theirs, atol=2e-6, rtol=1e-5)


@on_every_backend
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_float16_features_whose_squares_float16_cannot_hold(backend, device, size):
    x, y = ((size * (1 + torch.rand(2, 64, 6, 6))).to(device, torch.float16) for _ in range(2))
    weight = torch.rand(64, device=device)
    distance = lpips_distance(x, y, weight, backend=backend)
    exact = in_pytorch(x.cpu().double(), y.cpu().double(), weight.cpu())
    torch.testing.assert_close(distance.cpu().double(), exact, atol=1e-6, rtol=1e-5)


@on_every_backend
def test_float32_features_of_every_size_down_to_the_added_eps(backend, device):
    sizes = 10.0 ** torch.arange(-12, 13).view(1, 1, -1)
    x, y = ((torch.randn(2, 8, 25) * sizes).to(device) for _ in range(2))
    weight = torch.rand(8, device=device)
    distance, grad_x, *_ = call(
        lambda *t: lpips_distance(*t, backend=backend), (x, y, weight), torch.ones_like(x[:, 0, 0])
    )
    exact = call(in_pytorch, [t.cpu().double() for t in (x, y, weight)], torch.ones(2))
    torch.testing.assert_close(distance.cpu().double(), exact[0], atol=1e-6, rtol=1e-5)
    # Each pixel's gradient relative to its own size: they span 24 orders of magnitude.
    largest = exact[1].abs().amax(1, keepdim=True)
    assert ((grad_x.cpu().double() - exact[1]) / largest).abs().max() < 1e-5


@on_every_kernel
def test_a_nan_stays_in_its_sample(backend, device):
    x, y = (make((3, 40, 9, 9), torch.float32, device) for _ in range(2))
    x[1, 7, 2, 2] = float("nan")
    grads = call(lambda *t: lpips_distance(*t, backend=backend), (x, y, torch.rand(40, device=device)), y[:, 0, 0, 0])
    assert grads[0].isnan().tolist() == [False, True, False]
    bad = torch.zeros(3, 9, 9, dtype=torch.bool)
    bad[1, 2, 2] = True
    for gradient in grads[1:3]:
        assert torch.equal(gradient.isnan().any(1).cpu(), bad)


@on_every_kernel
def test_repeating_a_call_gives_the_same_bits(backend, device):
    x, y = (make((2, 65, 5, 7), torch.bfloat16, device) for _ in range(2))
    weight, grad = torch.rand(65, device=device), torch.randn(2, device=device)
    runs = [call(lambda *t: lpips_distance(*t, backend=backend), (x, y, weight), grad) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_cpu_result_does_not_depend_on_the_number_of_threads():
    inputs = []
    for layout in ("contiguous", "channels last"):
        x, y = (make((3, 70, 61, 67), torch.float32, layout=layout) for _ in range(2))
        inputs.append((x, y, torch.rand(70)))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                [
                    t
                    for each in inputs
                    for t in call(lambda *t: lpips_distance(*t, backend="cpu"), each, each[0][:, 0, 0, 0])
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in results[1:] for a, b in zip(results[0], run))


# ---- derivatives ----------------------------------------------------------------------------------------------------


def test_reference_passes_gradcheck_and_gradgradcheck():
    inputs = [torch.randn(2, 3, 2, 2, dtype=torch.float64).requires_grad_() for _ in range(2)]
    inputs.append(torch.rand(3, dtype=torch.float64).requires_grad_())
    assert torch.autograd.gradcheck(lpips_distance, inputs)
    assert torch.autograd.gradgradcheck(lpips_distance, inputs)


@on_every_kernel
@pytest.mark.parametrize(
    "asked", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_a_gradient_that_is_not_asked_for_is_not_made_and_changes_no_other(backend, device, asked):
    x, y = (make((2, 20, 7, 5), torch.float32, device) for _ in range(2))
    weight, grad = torch.rand(20, device=device), torch.randn(2, device=device)
    lpips_distance(x, y, weight, backend=backend)  # loads the library
    every = _backward(backend)(grad, x, y, weight, True, True, True)
    some = _backward(backend)(grad, x, y, weight, *asked)
    for made, of, wanted in zip(some, every, asked):
        assert torch.equal(made, of) if wanted else made.numel() == 0


@on_every_kernel
def test_second_derivatives_equal_float64(backend, device):
    x, y = (make((2, 5, 3, 4), torch.float32, device) for _ in range(2))
    weight = torch.rand(5, device=device)

    def penalty_gradients(function, *inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        first = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    ours = penalty_gradients(lambda *t: lpips_distance(*t, backend=backend), x, y, weight)
    exact = penalty_gradients(in_pytorch, *(t.cpu().double() for t in (x, y, weight)))
    torchs = penalty_gradients(in_pytorch, *(t.cpu() for t in (x, y, weight)))
    for a, b, c in zip(ours, exact, torchs):
        assert_close_to_exact(a.cpu(), b, c, torch.float32, relative=1e-5)


@on_every_kernel
def test_nothing_but_features_and_weights_is_saved(backend, device):
    x, y = (make((2, 6, 4, 4), torch.bfloat16, device).requires_grad_() for _ in range(2))
    weight, saved = torch.rand(6, device=device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lpips_distance([x, y], [y, x], [weight, weight], backend=backend)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, y, weight)}


# ---- the frameworks around it ---------------------------------------------------------------------------------------


@on_every_kernel
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_raw_ops_pass_opcheck(backend, device, layout):
    x, y = (make((2, 6, 4, 5), torch.float32, device, layout) for _ in range(2))
    weight, grad = torch.rand(6, device=device), torch.randn(2, device=device)
    lpips_distance(x, y, weight, backend=backend)  # loads the library
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_forward(backend), (x, y, weight), test_utils=tests)
    for asked in ((True, True, True), (True, False, False)):
        torch.library.opcheck(_backward(backend), (grad, x, y, weight, *asked), test_utils=tests)


@pytest.mark.parametrize(("backend", "device"), COMPILED)
def test_a_list_of_layers_compiles_into_one_graph(backend, device):
    def function(x, y, w, v):
        return lpips_distance([x * 1.0, x[:, :2] * 1.0], [y, y[:, :2] * 1.0], [w, v], backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, y = (make((2, 6, 4, 4), torch.float32, device) for _ in range(2))
    inputs, grad = (x, y, torch.rand(6, device=device), torch.rand(2, device=device)), torch.randn(2, device=device)
    for ours, plain in zip(call(compiled, inputs, grad), call(function, inputs, grad)):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(("backend", "device"), [b for b in BACKENDS if b.id in ("cpu", "triton", "cuda")])
def test_the_compiled_backward_is_the_kernel_s(backend, device):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    called = set()

    def collect(graph, _):
        called.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    x, y = (make((2, 6, 4, 4), torch.float32, device) for _ in range(2))
    weight = torch.rand(6, device=device)
    compiled = torch.compile(
        lambda x: lpips_distance(x, y, weight, backend=backend).sum(),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=collect),
    )
    compiled(x.requires_grad_()).backward()
    assert {f"fastdistill.lpips_distance.{backend}", f"fastdistill.lpips_distance_backward.{backend}"} <= called


@on_every_backend
def test_autocast_changes_nothing(backend, device):
    x, y = (make((2, 6, 4, 4), torch.float32, device) for _ in range(2))
    weight = torch.rand(6, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        distance = lpips_distance(x, y, weight, backend=backend)
    assert distance.dtype == torch.float32
    assert torch.equal(distance, lpips_distance(x, y, weight, backend=backend))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_is_captured_in_a_cuda_graph(backend):
    x, y = (make((2, 64, 33, 40), torch.float16, "cuda") for _ in range(2))
    weight, grad = torch.rand(64, device="cuda"), torch.randn(2, device="cuda")

    def both():
        return _forward(backend)(x, y, weight), *_backward(backend)(grad, x, y, weight, True, True, True)

    lpips_distance(x, y, weight, backend=backend)  # loads the library, or compiles
    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    x.copy_(torch.randn_like(x))
    grad.copy_(torch.randn_like(grad))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, both()))


# ---- which backend serves -------------------------------------------------------------------------------------------


def test_explain_names_the_choice_and_the_reasons():
    x = torch.randn(2, 4, 3, 3)
    explanation = explain("lpips_distance", x, x, torch.ones(4))
    assert explanation.backend == "cpu"
    assert explanation.reasons["cuda"] == ["needs a CUDA tensor, got cpu"]


UNREADABLE = {
    "float64": (lambda: torch.randn(2, 4, 3, 5, dtype=torch.float64), "float64"),
    "pixels turned over": (lambda: torch.randn(2, 4, 5, 3).transpose(2, 3), "neither contiguous nor channels last"),
    "a cropped image": (lambda: torch.randn(2, 4, 5, 7)[:, :, 1:4, 1:6], "neither contiguous nor channels last"),
    "every second channel": (lambda: torch.randn(2, 8, 3, 5)[:, ::2], "neither contiguous nor channels last"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_no_kernel_reads_is_served_by_the_reference(case):
    make_x, reason = UNREADABLE[case]
    x = make_x()
    y, weight = torch.randn(x.shape, dtype=x.dtype), torch.rand(4)
    for features in ((x, y), (y, x)):
        explanation = explain("lpips_distance", *features, weight)
        assert explanation.backend == "reference"
        assert any(reason in text for text in explanation.reasons["cpu"])
    exact = in_pytorch(x.double(), y.double(), weight)
    torch.testing.assert_close(lpips_distance(x, y, weight).double(), exact, atol=1e-6, rtol=1e-5)


def test_forcing_a_backend_that_cannot_serve_raises_with_its_reasons():
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(
        BackendError, match=r"lpips_distance: backend 'cuda' cannot serve .* needs a CUDA tensor, got cpu"
    ):
        lpips_distance([x], [x], [torch.ones(4)], backend="cuda")


@pytest.mark.parametrize("capability", _native.CPU_CAPABILITIES[:-1])
def test_lower_instruction_sets_pass_the_same_tests(capability):
    environment = {**os.environ, "FASTDISTILL_CPU_CAPABILITY": capability}
    selection = "cpu and not reference and (3x4x65x63 or 2x63x5x7 or own_layout or eps or equal_features)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", selection]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


# ---- bad input ------------------------------------------------------------------------------------------------------

X, W = torch.ones(2, 4, 3, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3.0, X, W), TypeError, "features_x: expected a tensor or a list of one per layer .* got float"),
        ((X, [X], W), TypeError, "features_y: expected a tensor, got list"),
        (([X], X, [W]), TypeError, "features_y: expected a tensor or a list .* got Tensor"),
        (([], [], []), ValueError, "features_x: needs at least one layer, got an empty list"),
        (([X, X], [X], [W, W]), ValueError, "features_y: expected 2 layers, as many as features_x has, got 1"),
        (([X, X], [X, X], [W]), ValueError, "weights: expected 2 layers, as many as features_x has, got 1"),
        (([X, X], [X, X[:, :3]], [W, W]), ValueError, r"features_y\[1\]: expected features_x's shape \(2, 4, 3, 3\)"),
        (([X, X], [X, X], [W, W[:3]]), ValueError, r"weights\[1\]: expected \(4,\) or \(1, 4, 1, 1\).* got \(3,\)"),
        ((X, X, W.view(4, 1)), ValueError, r"weights: expected \(4,\) or \(1, 4, 1, 1\).* got \(4, 1\)"),
        (
            ([X, X[:1]], [X, X[:1]], [W, W]),
            ValueError,
            r"features_x\[1\]: expected the batch of features_x\[0\], 2, got 1",
        ),
        (([X, X.double()], [X, X.double()], [W, W]), ValueError, r"features_x\[1\]: .*float64.*"),
        ((X, X.half(), W), TypeError, "features_y: expected features_x's dtype torch.float32, got torch.float16"),
        ((X.int(), X.int(), W), TypeError, "features_x: expected float32, .* got torch.int32"),
        ((X, X, W.int()), TypeError, "weights: expected a floating dtype, got torch.int32"),
        ((X[:, :0], X[:, :0], W[:0]), ValueError, "features_x: expected .* with C and pixels >= 1"),
        ((X[:, :, :0], X[:, :, :0], W), ValueError, "features_x: expected .* with C and pixels >= 1"),
        ((W, W, W), ValueError, r"features_x: expected \(B, C, \*spatial\) .* got \(4,\)"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_input_names_the_argument_the_layer_and_the_need(arguments, error, message, backend):
    with pytest.raises(error, match=message):
        lpips_distance(*arguments, backend=backend)


def test_the_reference_is_the_public_formula():
    x, y = (torch.randn(2, 5, 3, 4, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(reference(x, y, weight), in_pytorch(x, y, weight))
