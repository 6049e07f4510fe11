"""weighted_squared_error on every backend: numbers against float64, layouts, derivatives, compilation, bad input."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from fastdistill import _native
from fastdistill.ops import BackendError, explain, weighted_squared_error
from fastdistill.ops._dispatch import ops
from fastdistill.ops.weighted_squared_error import _backward, _forward, reference_gradient
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import (
    BACKENDS,
    COMPILED,
    DTYPES,
    in_every_dtype,
    on_every_backend,
    on_every_kernel,
    truncates,
)

OP = "weighted_squared_error"
# One element, odd images, points of a plane, numbers, and a video's latents.
SHAPES = [(1, 1, 1, 1), (3, 4, 65, 63), (33, 2), (5,), (2, 4, 3, 8, 9), (1, 4, 16, 16)]
ADD, FLOW, DENOISE = "one target, a weight", "two targets, numbers", "two targets, scales and a weight"
FORMS = [ADD, FLOW, DENOISE]
GRAD = 1.7


def in_pytorch(x, a, b=None, *, scale_a=1.0, scale_b=1.0, weight=1.0):
    """What a user would write, in float32 or float64 from the difference on."""
    wide = torch.promote_types(torch.promote_types(x.dtype, a.dtype), torch.float32)

    def over_batch(scale):
        return scale.to(wide).view(-1, *(1,) * (x.dim() - 1)) if isinstance(scale, torch.Tensor) else scale

    target = over_batch(scale_a) * a.to(wide)
    if b is not None:
        target = target + over_batch(scale_b) * b.to(wide)
    distances = ((x.to(wide) - target) ** 2).reshape(len(x), -1).mean(1)
    return (distances * weight).mean()


def make(shape, dtype, device="cpu", *, form=ADD, target=None):
    """(x, a[, b]) and the scales; on the CPU first, so that every device gets the same numbers."""
    batch, target = shape[0], target or dtype
    tensors = [torch.randn(shape).to(device, of) for of in (dtype, target, target)]
    scales = {
        ADD: {"weight": torch.rand(batch)},
        FLOW: {"scale_b": -1.0, "weight": 2.0},
        DENOISE: {"scale_a": torch.randn(batch), "scale_b": torch.randn(batch), "weight": torch.rand(batch)},
    }[form]
    moved = {name: s.to(device) if isinstance(s, torch.Tensor) else s for name, s in scales.items()}
    return tensors[: 2 if form == ADD else 3], moved


def loss_and_gradient(function, tensors, scales):
    x = tensors[0].detach().requires_grad_()
    loss = function(x, *tensors[1:], **scales)
    return loss.detach(), torch.autograd.grad(loss, x, torch.full_like(loss, GRAD))[0]


def on_cpu(tensors, scales, convert=lambda t: t):
    moved = {name: convert(s.cpu()) if isinstance(s, torch.Tensor) else s for name, s in scales.items()}
    return [convert(t.cpu()) for t in tensors], moved


def check_against_exact(backend, device, tensors, scales):
    x = tensors[0]
    loss, grad = loss_and_gradient(lambda *t, **s: weighted_squared_error(*t, **s, backend=backend), tensors, scales)
    exact_loss, exact = loss_and_gradient(in_pytorch, *on_cpu(tensors, scales, torch.Tensor.double))
    torch_loss, torchs = loss_and_gradient(in_pytorch, *on_cpu(tensors, scales))
    assert (loss.dtype, grad.dtype) == (torch.float32, x.dtype)
    assert grad.stride() == torch.empty_like(x).stride()
    assert_close_to_exact(loss.cpu(), exact_loss, torch_loss, torch.float32, what="loss")
    # The gradient shrinks with the number of elements: the rule is applied to it in units of its largest.
    unit = exact.abs().max().item() or 1.0
    ours, torchs = grad.cpu().double() / unit, torchs.double() / unit
    whole_ulp = truncates(backend, device, x.dtype)
    # float16 counts in steps of 6e-8 near 0, where the gradients of many elements are.
    steps = 6e-8 / unit if x.dtype == torch.float16 else 0.0
    assert_close_to_exact(ours, exact / unit, torchs, x.dtype, whole_ulp=whole_ulp, relative=steps, what="gradient")
    return loss, grad


@on_every_backend
@in_every_dtype
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_value_and_gradient_equal_float64(backend, device, shape, form, dtype):
    check_against_exact(backend, device, *make(shape, dtype, device, form=form))


MIXED = [(of_x, of_target) for of_x, of_target in itertools.product(DTYPES, DTYPES) if of_x != of_target]


@on_every_backend
@pytest.mark.parametrize(("dtype", "target"), MIXED, ids=lambda d: str(d)[6:])
def test_a_prediction_meets_targets_of_another_dtype_as_they_are(backend, device, dtype, target):
    for form in (ADD, DENOISE):
        tensors, scales = make((3, 4, 7, 9), dtype, device, form=form, target=target)
        assert explain(OP, *tensors, **scales, backend=backend).backend == backend
        check_against_exact(backend, device, tensors, scales)


VIEWS = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "every second sample": lambda t: t[::2],
    "a chunk of the channels": lambda t: t[:, 2:4],
    "channels before pixels turned around": lambda t: t.transpose(2, 3),
    "one sample of many": lambda t: t[1:2],
}


@on_every_kernel
@in_every_dtype
@pytest.mark.parametrize("view", VIEWS)
def test_dense_samples_in_any_order_are_read_in_place(backend, device, view, dtype):
    tensors, _ = make((4, 6, 8, 10), dtype, device, form=DENOISE)
    tensors = [VIEWS[view](t) for t in tensors]
    weight = torch.rand(len(tensors[0])).to(device)
    assert explain(OP, *tensors, weight=weight, backend=backend).backend == backend
    check_against_exact(backend, device, tensors, {"weight": weight, "scale_a": -0.3})


@on_every_kernel
@in_every_dtype
@pytest.mark.parametrize("late", ["x", "a", "b"])
def test_a_tensor_that_starts_one_element_late_is_read_right(backend, device, late, dtype):
    tensors, scales = make((2, 4, 8, 8), dtype, device, form=DENOISE)
    index = "xab".index(late)
    memory = torch.empty(tensors[index].numel() + 1, device=device, dtype=dtype)
    tensors[index] = memory[1:].view(2, 4, 8, 8).copy_(tensors[index])
    check_against_exact(backend, device, tensors, scales)


@on_every_backend
def test_scales_may_be_scalar_tensors_strided_and_of_other_dtypes(backend, device):
    tensors, _ = make((3, 4, 5, 7), torch.float32, device, form=DENOISE)
    wide = torch.rand(6, dtype=torch.float64).to(device)
    scales = {
        "scale_a": torch.tensor(0.7, device=device),
        "scale_b": wide[::2],
        "weight": torch.rand(3).half().to(device),
    }
    loss, grad = check_against_exact(backend, device, tensors, scales)
    same = {"scale_a": 0.7, "scale_b": wide[::2].float(), "weight": scales["weight"].float()}
    again = loss_and_gradient(lambda *t, **s: weighted_squared_error(*t, **s, backend=backend), tensors, same)
    assert torch.equal(loss, again[0])
    assert torch.equal(grad, again[1])


@on_every_backend
def test_an_empty_batch_gives_zero(backend, device):
    tensors, scales = make((0, 4, 8, 8), torch.float32, device, form=DENOISE)
    loss, grad = loss_and_gradient(lambda *t, **s: weighted_squared_error(*t, **s, backend=backend), tensors, scales)
    assert loss == 0
    assert grad.shape == (0, 4, 8, 8)


@on_every_backend
@in_every_dtype
def test_large_and_equal_values_stay_exact(backend, device, dtype):
    (x, a), scales = make((2, 3, 8, 8), dtype, device)
    check_against_exact(
        backend, device, [x.clamp(-3, 3) * 1e4, a.clamp(-3, 3) * 1e4], scales
    )  # squares overflow float16
    loss, grad = loss_and_gradient(lambda *t, **s: weighted_squared_error(*t, **s, backend=backend), [x, x], scales)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(x))


@on_every_kernel
def test_a_bad_value_reaches_the_loss_and_its_own_gradient_alone(backend, device):
    for name in ("x", "a", "weight"):
        (x, a), scales = make((3, 5, 7), torch.float32, device)
        {"x": x, "a": a}.get(name, scales["weight"]).view(3, -1)[1, -1] = float("nan")
        loss, grad = loss_and_gradient(lambda *t, **s: weighted_squared_error(*t, **s, backend=backend), [x, a], scales)
        assert loss.isnan()
        bad = torch.zeros(3, 35, dtype=torch.bool)
        bad[1, slice(None) if name == "weight" else -1] = True
        assert torch.equal(grad.isnan().cpu().view(3, 35), bad), name


@on_every_kernel
def test_an_infinite_scale_makes_no_nan_of_what_lies_beyond_the_end(backend, device):
    x, a = torch.zeros(1, 5, device=device), torch.ones(1, 5, device=device)
    scale = torch.tensor([float("inf")], device=device)
    assert weighted_squared_error(x, a, scale_a=scale, backend=backend) == float("inf")


@on_every_kernel
@in_every_dtype
def test_large_tensors_cross_every_block_border(backend, device, dtype):
    interpreted = backend == "triton" and device == "cpu"
    for shape in ((2, 4099), (70, 130)) if interpreted else ((2, 3, 203, 199), (3000, 70), (1, 300_001)):
        check_against_exact(backend, device, *make(shape, dtype, device, form=DENOISE))


@on_every_kernel
def test_repeating_a_call_gives_the_same_bits(backend, device):
    tensors, scales = make((3, 4, 65, 63), torch.bfloat16, device, form=DENOISE)
    runs = [
        loss_and_gradient(lambda *t, **s: weighted_squared_error(*t, **s, backend=backend), tensors, scales)
        for _ in range(3)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))


def test_cpu_result_does_not_depend_on_the_number_of_threads():
    cases = [make(shape, torch.float32, form=form) for shape in ((2, 100003), (511, 517)) for form in (ADD, FLOW)]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([t for case in cases for t in loss_and_gradient(weighted_squared_error, *case)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in results[1:] for a, b in zip(results[0], run))


# ---- derivatives ----------------------------------------------------------------------------------------------------


def test_reference_passes_gradcheck_and_gradgradcheck():
    (x, a, b), scales = make((2, 3, 2), torch.float64, form=DENOISE)
    scales = {name: scale.double() for name, scale in scales.items()}
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: weighted_squared_error(x, a, b, **scales), (x,))
    assert torch.autograd.gradgradcheck(lambda x: weighted_squared_error(x, a, b, **scales), (x,))


def test_the_gradient_in_pytorch_is_the_reference_s():
    tensors, scales = make((3, 4, 5), torch.float64, form=DENOISE)
    _, expected = loss_and_gradient(in_pytorch, tensors, scales)
    torch.testing.assert_close(
        reference_gradient(torch.tensor(GRAD), *tensors, *scales.values()), expected
    )  # fmt: skip


@on_every_kernel
@in_every_dtype
def test_double_backward_equals_the_reference_in_float64(backend, device, dtype):
    tensors, scales = make((4, 34), dtype, device, form=DENOISE)
    direction = torch.randn(4, 34)

    def penalty_gradient(function, tensors, scales):
        x = tensors[0].detach().requires_grad_()
        (first,) = torch.autograd.grad(function(x, *tensors[1:], **scales) * 100, x, create_graph=True)
        return torch.autograd.grad((first * direction.to(first)).square().sum(), x)[0]

    ours = penalty_gradient(lambda *t, **s: weighted_squared_error(*t, **s, backend=backend), tensors, scales)
    exact = penalty_gradient(in_pytorch, *on_cpu(tensors, scales, torch.Tensor.double))
    torchs = penalty_gradient(in_pytorch, *on_cpu(tensors, scales))
    assert_close_to_exact(ours.cpu(), exact, torchs, dtype, what="second derivative")


@on_every_backend
def test_x_alone_receives_a_gradient(backend, device):
    tensors, scales = make((3, 4, 5), torch.float32, device, form=DENOISE)
    everything = [t.requires_grad_() for t in (*tensors, *scales.values())]
    weighted_squared_error(*tensors, **scales, backend=backend).backward()
    assert everything[0].grad.abs().max() > 0
    assert all(t.grad is None for t in everything[1:])
    constant = weighted_squared_error(tensors[0].detach(), *tensors[1:], **scales, backend=backend)
    assert not constant.requires_grad


@on_every_kernel
def test_nothing_but_the_inputs_is_saved(backend, device):
    tensors, scales = make((3, 4, 5), torch.bfloat16, device, form=DENOISE)
    tensors[0].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        weighted_squared_error(*tensors, **scales, backend=backend)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (*tensors, *scales.values())]


# ---- the frameworks around it ---------------------------------------------------------------------------------------


@on_every_kernel
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "chunk"])
def test_raw_ops_pass_opcheck(backend, device, layout, form):
    tensors, scales = make((2, 6, 4, 5), torch.float32, device, form=form)
    if layout == "channels last":
        tensors = [t.to(memory_format=torch.channels_last) for t in tensors]
    elif layout == "chunk":
        tensors = [t[:, :3] for t in tensors]
    x, a, b = (*tensors, None)[:3]
    split = [(s, 1.0) if isinstance(s, torch.Tensor) else (None, s) for s in ({**NEUTRAL, **scales}).values()]
    call = (x, a, b, *(s for s, _ in split), *(v for _, v in split))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_forward(backend), call, test_utils=tests)
    torch.library.opcheck(_backward(backend), (torch.tensor(GRAD, device=device), *call), test_utils=tests)


NEUTRAL = {"scale_a": 1.0, "scale_b": 1.0, "weight": 1.0}


@pytest.mark.parametrize(("backend", "device"), COMPILED)
def test_compiles_into_one_graph_with_dynamic_shapes(backend, device):
    def function(x, a, weight):
        return weighted_squared_error(x * 1.0, a, weight=weight, backend=backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((4, 3, 16), (7, 5, 22), (9, 2, 6)):
        (x, a), scales = make(shape, torch.float32, device)
        ours, plain = (
            loss_and_gradient(lambda x, a, weight, f=f: f(x, a, weight), [x, a], scales) for f in (compiled, function)
        )
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(("backend", "device"), [b for b in BACKENDS if b.id in ("cpu", "triton", "cuda")])
def test_the_compiled_backward_is_the_kernel_s(backend, device):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    called = set()

    def collect(graph, _):
        called.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    (x, a), scales = make((4, 16), torch.float32, device)
    compiled = torch.compile(
        lambda x: weighted_squared_error(x, a, **scales, backend=backend),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=collect),
    )
    compiled(x.requires_grad_()).backward()
    assert {f"fastdistill.{OP}.{backend}", f"fastdistill.{OP}_backward.{backend}"} <= called


@on_every_backend
def test_autocast_changes_nothing(backend, device):
    tensors, scales = make((3, 4, 34), torch.float32, device, form=DENOISE)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = weighted_squared_error(*tensors, **scales, backend=backend)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, weighted_squared_error(*tensors, **scales, backend=backend))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 3, 512, 512)], ids=["one launch", "two"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_is_captured_in_a_cuda_graph(backend, shape):
    (x, a), scales = make(shape, torch.float16, "cuda")
    call = (x, a, None, None, None, scales["weight"], 1.0, 1.0, 1.0)
    grad = torch.tensor(GRAD, device="cuda")
    weighted_squared_error(x, a, **scales, backend=backend)  # loads the library, or compiles
    forward, backward = _forward(backend), _backward(backend)
    backward(grad, *call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad_x = forward(*call), backward(grad, *call)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(loss, forward(*call))
    assert torch.equal(grad_x, backward(grad, *call))


# ---- which backend serves -------------------------------------------------------------------------------------------


def test_explain_names_the_choice_and_every_reason():
    explanation = explain(OP, torch.randn(4, 8), torch.randn(4, 8))
    assert explanation.backend == "cpu"
    assert explanation.reasons["cpu"] == []
    assert explanation.reasons["cuda"] == ["needs a CUDA tensor, got cpu"]
    assert list(explanation.reasons) == [b.name for b in ops()[OP].backends]


X = torch.randn(4, 6, 8, 10)
UNREADABLE = {
    "float64": ((X.double(), X), "float64"),
    "a float64 target": ((X, X.double()), "float64"),
    "targets of two dtypes": ((X, X, X.half()), "a is torch.float32 and b torch.float16"),
    "another memory order": ((X, X.to(memory_format=torch.channels_last)), "one memory order"),
    "samples with gaps": ((X[..., 1:], X[..., 1:]), "dense samples"),
    "one target for all samples": ((X, X[:1].expand_as(X)), "not overlapping"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_no_kernel_reads_is_served_by_the_reference(case):
    tensors, reason = UNREADABLE[case]
    explanation = explain(OP, *tensors, weight=torch.rand(4))
    assert explanation.backend == "reference"
    assert any(reason in text for text in explanation.reasons["cpu"])
    tensors = [tensors[0], *(t + 1 for t in tensors[1:-1]), tensors[-1]]
    loss, grad = loss_and_gradient(weighted_squared_error, tensors, {})
    exact = loss_and_gradient(in_pytorch, [t.double() for t in tensors], {})
    torch.testing.assert_close((loss.double(), grad.double()), exact, rtol=1e-5, atol=1e-7)


def test_forcing_a_backend_that_cannot_serve_raises_with_its_reasons():
    with pytest.raises(BackendError, match="backend 'cuda' cannot serve this call: needs a CUDA tensor, got cpu"):
        weighted_squared_error(X, X, backend="cuda")
    with pytest.raises(BackendError, match=f"{OP} has no backend 'cudnn'; it has: cuda, triton, cpu, reference"):
        weighted_squared_error(X, X, backend="cudnn")
    with pytest.raises(BackendError, match=r"'cpu' cannot serve this call: strides .* one memory order"):
        weighted_squared_error(X, X.to(memory_format=torch.channels_last), backend="cpu")


@pytest.mark.parametrize("capability", _native.CPU_CAPABILITIES[:-1])
def test_lower_instruction_sets_pass_the_same_tests(capability):
    environment = {**os.environ, "FASTDISTILL_CPU_CAPABILITY": capability}
    selection = "cpu and (equal_float64 or another_dtype or beyond_the_end or one_element_late or border)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k"]
    run = subprocess.run([*command, f"{selection} and not reference"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "scales", "error", "message"),
    [
        (([1.0], X), {}, TypeError, "x: expected a tensor, got list"),
        ((X, None), {}, TypeError, "a: expected a tensor, got NoneType"),
        ((X, X, 1.0), {}, TypeError, "b: expected a tensor, got float"),
        ((X, X.int()), {}, TypeError, "a: expected float32, .* got torch.int32"),
        ((X, X[:2]), {}, ValueError, r"a: expected x's shape \(4, 6, 8, 10\), got \(2, 6, 8, 10\)"),
        ((X, X.to("meta")), {}, ValueError, "a: expected on x's device cpu, got meta"),
        ((torch.tensor(1.0), torch.tensor(1.0)), {}, ValueError, r"x: expected \(B, \.\.\.\)"),
        (
            (X[:, :0], X[:, :0]),
            {},
            ValueError,
            r"x: a sample must have at least one element, got shape \(4, 0, 8, 10\)",
        ),
        ((X, X), {"scale_b": 2.0}, ValueError, "scale_b: given without b"),
        ((X, X), {"weight": "1"}, TypeError, "weight: expected a number or a tensor, got str"),
        ((X, X), {"weight": float("nan")}, ValueError, "weight: expected a finite number, got nan"),
        ((X, X), {"weight": torch.ones(3)}, ValueError, r"weight: expected shape \(\) or \(4,\), .* got \(3,\)"),
        (
            (X, X),
            {"scale_a": torch.ones(4).int()},
            TypeError,
            "scale_a: expected a floating-point tensor, got torch.int32",
        ),
        ((X, X), {"weight": torch.ones(4, device="meta")}, ValueError, "weight: expected on x's device cpu, got meta"),
    ],
)
def test_bad_input_names_the_argument_the_value_and_the_need(arguments, scales, error, message):
    for backend in (None, "reference"):
        with pytest.raises(error, match=message):
            weighted_squared_error(*arguments, **scales, backend=backend)
    with pytest.raises(error, match=message):
        explain(OP, *arguments, **scales)
