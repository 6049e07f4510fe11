"""group_norm_silu on every backend: numbers against float64, layouts, derivatives, compilation, bad input."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastdistill import _native
from fastdistill.ops import BackendError, explain, group_norm_silu
from fastdistill.ops._dispatch import ops
from fastdistill.ops.group_norm_silu import _backward, _forward, reference
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import BACKENDS, DTYPES, gradients, on_every_backend, on_every_kernel, truncates

# (shape, groups): C/G of 1, 3, 10; prime sizes; one pixel; every number of dimensions; a partial last vector.
SHAPES = [
    ((2, 8, 5, 7), 8),
    ((2, 12, 13, 11), 4),
    ((1, 20, 8, 8), 2),
    ((3, 6, 1, 1), 2),
    ((3, 6, 1, 1), 6),
    ((2, 10), 5),
    ((2, 9, 17), 3),
    ((1, 8, 3, 2, 5), 4),
    ((1, 64, 16, 16), 32),
]


def to_layout(x, layout):
    """The same values in another layout; 3-d and 2-d tensors by a transposed buffer."""
    if layout == "contiguous" or x.dim() == 2:
        return x.contiguous()
    order = [0, *range(2, x.dim()), 1]
    inverse = [0, x.dim() - 1, *range(1, x.dim() - 1)]
    return x.permute(order).contiguous().permute(inverse)


def make(shape, dtype, device, layout="contiguous", mean=0.0, std=1.0, with_add=True, parameter_dtype=None):
    channels = shape[1]
    parameter_dtype = parameter_dtype or dtype
    x = to_layout((torch.randn(shape) * std + mean).to(device, dtype), layout)
    weight = (torch.randn(channels) + 1).to(device, parameter_dtype)
    bias = torch.randn(channels).to(device, parameter_dtype)
    add = torch.randn(shape[:2]).to(device, dtype) if with_add else None
    return x, weight, bias, add


def in_dtype(x, groups, weight, bias, add, eps, silu, dtype):
    """What a user would write in PyTorch, in `dtype` from end to end."""
    x, weight, bias, add = (None if t is None else t.to(dtype) for t in (x, weight, bias, add))
    u = x if add is None else x + add.reshape(add.shape + (1,) * (x.dim() - 2))
    if bias is not None and weight is None:  # torch's backward fails on a bias alone
        weight = torch.ones_like(bias)
    z = torch.group_norm(u.contiguous(), groups, weight, bias, eps)
    return F.silu(z) if silu else z


def check_against_exact(
    backend, device, x, groups, weight, bias, add, silu=True, grad_y=None, eps=1e-5, large_mean=False
):
    dtype = x.dtype
    grad_y = torch.randn(x.shape).to(device, dtype) if grad_y is None else grad_y

    def ours(x, w, b, a):
        return group_norm_silu(x, groups, w, b, eps, silu=silu, add=a, backend=backend)

    y, grads = gradients(ours, (x, weight, bias, add), grad_y)
    # Exact on the values that the kernel saw; torch's own error in the dtype of x.
    wide = [None if t is None else t.double().cpu() for t in (x, weight, bias, add)]
    exact_y, exact = gradients(
        lambda x, w, b, a: in_dtype(x, groups, w, b, a, eps, silu, torch.float64), wide, grad_y.double().cpu()
    )
    narrow = [None if t is None else t.cpu() for t in (x, weight, bias, add)]
    torch_y, torchs = gradients(lambda x, w, b, a: in_dtype(x, groups, w, b, a, eps, silu, dtype), narrow, grad_y.cpu())
    names = [name for name, t in zip(("x", "weight", "bias", "add"), narrow) if t is not None]
    whole_ulp = truncates(backend, device, dtype)
    assert_close_to_exact(y.cpu(), exact_y, torch_y, dtype, large_mean=large_mean, whole_ulp=whole_ulp, what="y")
    for name, ours_, exact_, torch_ in zip(names, grads, exact, torchs):
        assert_close_to_exact(
            ours_.cpu(), exact_, torch_, dtype, large_mean=large_mean, whole_ulp=whole_ulp, what=f"gradient of {name}"
        )
    assert y.stride() == torch.empty_like(x).stride(), "layout in = layout out"
    if backend != "reference":
        assert grads[0].stride() == torch.empty_like(x).stride()
    return y


@on_every_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups"), SHAPES, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else v
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_result_and_gradients_equal_float64(backend, device, shape, groups, dtype, layout):
    check_against_exact(backend, device, *_with_groups(make(shape, dtype, device, layout), groups))


def _with_groups(tensors, groups):
    x, weight, bias, add = tensors
    return x, groups, weight, bias, add


@on_every_backend
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("present", ["none", "weight", "bias", "add"])
def test_every_optional_argument_can_be_left_out(backend, device, present, silu):
    x, weight, bias, add = make((2, 12, 5, 3), torch.float32, device)
    keep = {"weight": weight, "bias": bias, "add": add}
    chosen = [t if name == present else None for name, t in keep.items()]
    check_against_exact(backend, device, x, 4, *chosen, silu=silu)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_may_be_float32_beside_16_bit_input(backend, device, dtype):
    x, weight, bias, add = make((2, 12, 5, 3), dtype, device, parameter_dtype=torch.float32)
    y, grads = gradients(
        lambda x, w, b, a: group_norm_silu(x, 4, w, b, add=a, backend=backend),
        (x, weight, bias, add.float()),
        torch.ones_like(x),
    )
    assert y.dtype == dtype
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32, torch.float32]
    check_against_exact(backend, device, x, 4, weight, bias, add)


@on_every_backend
@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [(torch.float32, 100.0, 0.01), (torch.float16, 30.0, 0.5), (torch.bfloat16, 30.0, 0.5)],
    ids=["float32", "float16", "bfloat16"],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_mean_far_above_the_deviation_keeps_its_digits(backend, device, dtype, mean, std, layout):
    x, weight, bias, _ = make((2, 32, 16, 16), dtype, device, layout, mean, std, with_add=False)
    check_against_exact(backend, device, x, 8, weight, bias, None, large_mean=True)


@on_every_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_first_value_far_from_the_rest_does_not_spoil_the_variance(backend, device, layout):
    x, weight, bias, _ = make((1, 8, 16, 16), torch.float32, device, layout, with_add=False)
    x[0, :, 0, 0] = 1000.0
    check_against_exact(backend, device, x, 4, weight, bias, None)


@on_every_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_constant_image_gives_the_bias_and_finite_gradients(backend, device, dtype, layout):
    _, weight, bias, _ = make((2, 8, 6, 6), dtype, device)
    x = to_layout(torch.full((2, 8, 6, 6), 3.0, device=device, dtype=dtype), layout)
    y, grads = gradients(
        lambda x, w, b: group_norm_silu(x, 2, w, b, backend=backend), (x, weight, bias), torch.randn_like(x)
    )
    expected = F.silu(bias.float()).to(dtype).reshape(1, 8, 1, 1).expand_as(y)
    # The mean's last place, times rstd = 1/sqrt(eps) = 316.
    torch.testing.assert_close(y, expected, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in grads)


@on_every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_view_that_starts_one_element_late_is_read_right(backend, device, dtype, layout):
    x, weight, bias, add = make((2, 16, 8, 8), dtype, device, layout)
    late = torch.empty(x.numel() + 1, device=device, dtype=dtype)[1:].as_strided(x.shape, x.stride(), 1)
    late.copy_(x)
    weight = torch.cat([weight[:1], weight])[1:]
    bias = torch.cat([bias[:1], bias])[1:]
    check_against_exact(backend, device, late, 4, weight, bias, add)


@on_every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_samples_and_channels_are_read_in_place(backend, device, dtype):
    wide = make((4, 24, 6, 5), dtype, device, "channels_last")[0]
    x, weight, bias, add = wide[::2, :16], *make((2, 16, 6, 5), dtype, device)[1:]
    assert explain("group_norm_silu", x, 4, backend=backend).backend == backend
    check_against_exact(backend, device, x, 4, weight, bias, add)
    every_other = make((4, 16, 6, 5), dtype, device)[0][::2]
    check_against_exact(backend, device, every_other, 4, weight, bias, add)


@on_every_kernel
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("arrival", ["other layout", "expanded", "per channel", "sliced"])
def test_gradient_may_arrive_in_any_layout(backend, device, layout, arrival):
    x, weight, bias, add = make((2, 16, 6, 5), torch.float32, device, layout)
    other = {"contiguous": "channels_last", "channels_last": "contiguous"}[layout]
    grad_y = {
        "other layout": to_layout(torch.randn(x.shape, device=device), other),
        "expanded": torch.tensor(0.7, device=device).expand(x.shape),
        "per channel": torch.randn(2, 16, 1, 1, device=device).expand(x.shape),
        "sliced": torch.randn(2, 16, 6, 9, device=device)[..., 2:7],  # no single spatial stride: the reference serves
    }[arrival]
    check_against_exact(backend, device, x, 4, weight, bias, add, grad_y=grad_y)


@on_every_kernel
def test_large_tensors_cross_every_block_border(backend, device):
    # More rows, pixels and groups than one block or task of any backend takes.
    size = 40 if backend == "triton" and device == "cpu" else 130
    for layout in ("contiguous", "channels_last"):
        x, weight, bias, add = make((1, 48, size, size + 1), torch.float32, device, layout)
        check_against_exact(backend, device, x, 3, weight, bias, add)
        check_against_exact(backend, device, x, 1, weight, bias, None)


@on_every_backend
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(backend, device):
    x, weight, bias, add = make((0, 8, 4, 4), torch.float32, device)
    y, grads = gradients(
        lambda x, w, b, a: group_norm_silu(x, 2, w, b, add=a, backend=backend), (x, weight, bias, add), x
    )
    assert y.shape == x.shape
    assert grads[0].shape == x.shape
    assert grads[1].eq(0).all()
    assert grads[2].eq(0).all()
    assert grads[3].shape == add.shape


@on_every_kernel
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_stays_in_its_group(backend, device, layout):
    x = make((2, 8, 6, 6), torch.float32, device, layout)[0]
    x[1, 5, 2, 3] = float("nan")
    y = group_norm_silu(x, 4, backend=backend)
    assert y[1, 4:6].isnan().all()
    assert y[0].isfinite().all()
    assert y[1, :4].isfinite().all()
    assert y[1, 6:].isfinite().all()


@on_every_kernel
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeating_a_call_gives_the_same_bits(backend, device, layout):
    tensors = make((2, 32, 33, 17), torch.bfloat16, device, layout)
    runs = []
    for _ in range(3):
        y, grads = gradients(
            lambda x, w, b, a: group_norm_silu(x, 8, w, b, add=a, backend=backend), tensors, torch.ones_like(tensors[0])
        )
        runs.append((y, *grads))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cpu_result_does_not_depend_on_the_number_of_threads(layout):
    tensors = make((1, 6, 150, 151), torch.float32, "cpu", layout)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, grads = gradients(
                lambda x, w, b, a: group_norm_silu(x, 3, w, b, add=a, backend="cpu"), tensors, tensors[0]
            )
            results.append((y, *grads))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in results[1:] for a, b in zip(results[0], run))


# ---- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silu", [True, False])
def test_reference_passes_gradcheck_and_gradgradcheck(silu):
    x, weight, bias, add = (t.double().requires_grad_() for t in make((2, 6, 3, 2), torch.float32, "cpu"))

    def function(x, weight, bias, add):
        return group_norm_silu(x, 2, weight, bias, silu=silu, add=add)

    assert torch.autograd.gradcheck(function, (x, weight, bias, add))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, add))


@on_every_kernel
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_double_backward_equals_the_reference_in_float64(backend, device, layout):
    x, weight, bias, add = make((2, 12, 4, 5), torch.float32, device, layout)
    direction = torch.randn_like(x)

    def penalty_gradients(function, *inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = function(*leaves)
        first = torch.autograd.grad(y, leaves, direction.to(y.device, y.dtype), create_graph=True)
        # Every first derivative takes part, so every second one is seen.
        penalty = sum((g * g).sum() for g in first)
        return torch.autograd.grad(penalty, leaves)

    ours = penalty_gradients(
        lambda x, w, b, a: group_norm_silu(x, 4, w, b, add=a, backend=backend), x, weight, bias, add
    )
    wide = [t.double().cpu() for t in (x, weight, bias, add)]
    exact = penalty_gradients(lambda x, w, b, a: in_dtype(x, 4, w, b, a, 1e-5, True, torch.float64), *wide)
    narrow = [t.cpu() for t in (x, weight, bias, add)]
    torchs = penalty_gradients(lambda x, w, b, a: in_dtype(x, 4, w, b, a, 1e-5, True, torch.float32), *narrow)
    for name, a, b, c in zip(("x", "weight", "bias", "add"), ours, exact, torchs):
        assert_close_to_exact(a.cpu(), b, c, torch.float32, what=f"second derivative by {name}")


@on_every_kernel
def test_a_penalty_on_the_input_gradient_trains_the_weight(backend, device):
    # The R1 pattern: only x needs the first gradient, only the weight the second.
    x, weight, bias, _ = make((2, 8, 4, 4), torch.float32, device, with_add=False)
    x.requires_grad_()
    weight.requires_grad_()
    (g,) = torch.autograd.grad(group_norm_silu(x, 2, weight, bias, backend=backend).sum(), x, create_graph=True)
    (ours,) = torch.autograd.grad(g.square().sum(), weight)
    xd, wd = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    (g,) = torch.autograd.grad(reference(xd, 2, wd, bias.double()).sum(), xd, create_graph=True)
    (exact,) = torch.autograd.grad(g.square().sum(), wd)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_third_derivative_goes_through():
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    xd = x.detach().double().requires_grad_()

    def third(x):
        (g,) = torch.autograd.grad(group_norm_silu(x, 2).sum(), x, create_graph=True)
        (g,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    torch.testing.assert_close(third(x).double(), third(xd), rtol=1e-3, atol=1e-3)


# ---- the frameworks around it ---------------------------------------------------------------------------------------


@on_every_kernel
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("optional", [True, False])
def test_raw_ops_pass_opcheck(backend, device, layout, optional):
    x, weight, bias, add = make((2, 8, 4, 5), torch.float32, device, layout)
    if not optional:
        weight = bias = add = None
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    forward = _forward(backend)
    torch.library.opcheck(forward, (x, 4, weight, bias, add, 1e-5, True), test_utils=tests)
    _, mean, rstd = forward(x, 4, weight, bias, add, 1e-5, True)
    arguments = (torch.randn_like(x), x, 4, weight, bias, add, mean, rstd, True)
    torch.library.opcheck(_backward(backend), arguments, test_utils=tests)


@pytest.mark.parametrize(("backend", "device"), [b for b in BACKENDS if b.id != "triton-interpreted"])
def test_compiles_into_one_graph_with_dynamic_shapes(backend, device):
    def function(x, weight, bias, add):
        return group_norm_silu(x * 1.0, 4, weight, bias, add=add, backend=backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (4, 7, 9):
        tensors = make((2, 8, size, size + 2), torch.float32, device)
        ours, ours_grads = gradients(compiled, tensors, torch.ones_like(tensors[0]))
        plain, plain_grads = gradients(function, tensors, torch.ones_like(tensors[0]))
        for a, b in zip((ours, *ours_grads), (plain, *plain_grads)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("backend", "device"), [b for b in BACKENDS if b.id in ("cpu", "triton", "cuda")])
def test_compiles_with_the_default_compiler(backend, device):
    x, weight, bias, _ = make((1, 8, 6, 6), torch.float32, device, "channels_last", with_add=False)
    compiled = torch.compile(
        lambda x: torch.relu(group_norm_silu(x + 1, 4, weight, bias, backend=backend)), fullgraph=True
    )
    torch.testing.assert_close(compiled(x), torch.relu(group_norm_silu(x + 1, 4, weight, bias, backend=backend)))


@on_every_backend
def test_autocast_keeps_the_dtype_of_x(backend, device):
    x, weight, bias, _ = make((1, 8, 4, 4), torch.bfloat16, device, parameter_dtype=torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = group_norm_silu(x, 4, weight, bias, backend=backend)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, group_norm_silu(x, 4, weight, bias, backend=backend))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_is_captured_in_a_cuda_graph(backend):
    x, weight, bias, add = make((1, 64, 32, 32), torch.float16, "cuda", "channels_last")
    group_norm_silu(x, 32, weight, bias, add=add, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = group_norm_silu(x, 32, weight, bias, add=add, backend=backend)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, group_norm_silu(x, 32, weight, bias, add=add, backend=backend))


# ---- which backend serves -------------------------------------------------------------------------------------------


def test_explain_names_the_choice_and_every_reason():
    explanation = explain("group_norm_silu", torch.randn(1, 8, 4, 4), 4)
    assert explanation.backend == "cpu"
    assert explanation.reasons["cpu"] == []
    assert explanation.reasons["cuda"] == ["needs a CUDA tensor, got cpu"]
    assert "needs a CUDA tensor" in str(explanation)
    assert list(explanation.reasons) == [b.name for b in ops()["group_norm_silu"].backends]
    assert explain("group_norm_silu", x=torch.randn(1, 8, 4, 4), num_groups=4) == explanation


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.randn(1, 8, 4, 4, dtype=torch.float64), "float64"),
        (torch.randn(1, 8, 4, 8)[..., ::2], "strides"),
        (torch.randn(1, 8, 1, 1).expand(2, 8, 4, 4), "strides"),
        (torch.randn(1, 8, 4, 4).expand(3, 8, 4, 4), "strides"),
        (torch.randn(1, 8, 4, 4).to(memory_format=torch.channels_last).expand(3, 8, 4, 4), "strides"),
    ],
    ids=["float64", "every other column", "expanded", "one sample expanded", "one sample expanded, channels last"],
)
def test_what_no_kernel_reads_is_served_by_the_reference(x, reason):
    explanation = explain("group_norm_silu", x, 4)
    assert explanation.backend == "reference"
    assert any(reason in text for text in explanation.reasons["cpu"])
    exact = in_dtype(x, 4, None, None, None, 1e-5, True, torch.float64)
    torch.testing.assert_close(group_norm_silu(x, 4).double(), exact, rtol=1e-5, atol=1e-5)


def test_forcing_a_backend_that_cannot_serve_raises_with_its_reasons(monkeypatch):
    x = torch.randn(1, 8, 4, 4)
    with pytest.raises(BackendError, match="'cuda' cannot serve this call: needs a CUDA tensor, got cpu"):
        group_norm_silu(x, 4, backend="cuda")
    with pytest.raises(BackendError, match="no backend 'cudnn'; it has: cuda, triton, cpu, reference"):
        group_norm_silu(x, 4, backend="cudnn")
    monkeypatch.setenv("FASTDISTILL_BACKEND", "cuda")
    with pytest.raises(BackendError, match="'cuda' cannot serve"):
        group_norm_silu(x, 4)


def test_environment_chooses_per_op_before_all_ops_and_the_argument_before_both(monkeypatch):
    x = torch.randn(1, 8, 4, 4)
    monkeypatch.setenv("FASTDISTILL_BACKEND", "cuda,group_norm_silu=reference")
    assert explain("group_norm_silu", x, 4).backend == "reference"
    assert explain("group_norm_silu", x, 4, backend="cpu").backend == "cpu"
    monkeypatch.setenv("FASTDISTILL_BACKEND", "group_norm_slu=reference")
    with pytest.raises(BackendError, match=r"unknown op 'group_norm_slu'; known: .*group_norm_silu"):
        group_norm_silu(x, 4)


def test_explain_refuses_an_unknown_op():
    with pytest.raises(ValueError, match=r"op='group_norm': unknown; known ops: .*group_norm_silu"):
        explain("group_norm", torch.randn(1, 8, 4, 4), 4)


@pytest.mark.parametrize("capability", _native.CPU_CAPABILITIES[:-1])
def test_lower_instruction_sets_pass_the_same_tests(capability):
    environment = {**os.environ, "FASTDISTILL_CPU_CAPABILITY": capability}
    show = "from fastdistill import _native; print(_native.cpu_library().detail)"
    shown = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == min(capability, _native.cpu_library().detail, key=_native.CPU_CAPABILITIES.index)
    selection = "cpu and (equal_float64 or digits or starts_one or border or nan_stays) and not reference"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", selection]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_an_unknown_instruction_set_is_refused_by_name():
    environment = {**os.environ, "FASTDISTILL_CPU_CAPABILITY": "avx1024"}
    call = "import torch; from fastdistill.ops import group_norm_silu; group_norm_silu(torch.ones(1, 2, 3), 1)"
    run = subprocess.run([sys.executable, "-c", call], env=environment, capture_output=True, text=True)
    assert "FASTDISTILL_CPU_CAPABILITY='avx1024': expected one of baseline, avx2, avx512" in run.stderr


# ---- bad input ------------------------------------------------------------------------------------------------------

GOOD = {"x": torch.ones(2, 8, 4, 4), "num_groups": 4}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.ones(8)}, ValueError, "x: expected .* 2 to 5 dimensions, got shape (8,)"),
        ({"x": torch.ones(1, 8, 1, 1, 1, 1)}, ValueError, "x: expected .* 2 to 5 dimensions"),
        ({"x": torch.ones(2, 8, 4, 4, dtype=torch.int32)}, TypeError, "x: expected float32, .* got torch.int32"),
        (
            {"x": torch.ones(2, 8, 4, 4, dtype=torch.complex64)},
            TypeError,
            "x: expected float32, .* got torch.complex64",
        ),
        ({"x": torch.ones(2, 0, 4, 4)}, ValueError, "x: needs at least one channel"),
        ({"x": torch.ones(2, 8, 0, 4)}, ValueError, "x: needs at least one channel and one spatial value"),
        ({"num_groups": 3}, ValueError, "num_groups: must .* divide the 8 channels of x, got 3"),
        ({"num_groups": 0}, ValueError, "num_groups: must be at least 1"),
        ({"num_groups": -4}, ValueError, "num_groups: must be at least 1"),
        ({"num_groups": 4.0}, TypeError, "num_groups: expected an int, got float"),
        ({"num_groups": True}, TypeError, "num_groups: expected an int, got bool"),
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
        ({"add": torch.ones(8)}, ValueError, "add: expected shape (2, 8), got (8,)"),
        ({"add": torch.ones(1, 8)}, ValueError, "add: expected shape (2, 8), got (1, 8)"),
        ({"add": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "add: expected x's dtype"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_input_names_the_argument_the_value_and_the_need(change, error, message, backend):
    message = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(error, match=message):
        group_norm_silu(**{**GOOD, **change}, backend=backend)
