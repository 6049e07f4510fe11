"""adversarial_loss on every backend: numbers against float64, layouts, derivatives, compilation, bad input."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastdistill import _native
from fastdistill.ops import BackendError, adversarial_loss, explain
from fastdistill.ops._dispatch import ops
from fastdistill.ops.adversarial_loss import FUNCTIONS, _backward, _forward, reference, reference_gradient
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import BACKENDS, in_every_dtype

HERE = [b for b in BACKENDS if b.id in ("cpu", "reference", "cuda")]
on_every_backend = pytest.mark.parametrize(("backend", "device"), HERE)
on_every_kernel = pytest.mark.parametrize(("backend", "device"), [b for b in HERE if b.id != "reference"])
for_every_function = pytest.mark.parametrize("function", FUNCTIONS)

# Per head: ADD's heads, one logit, odd sizes, a whole video of logits, several pieces of a thread's work.
SHAPES = [(8, 1, 197), (1, 1, 1, 1), (3, 4, 65, 63), (2, 3, 5, 7, 9), (5,), ()]
TERMS = {"hinge": lambda z: F.relu(1 + z), "linear": lambda z: z, "softplus": F.softplus}


def in_pytorch(up, down, function, heads):
    """What a user would write."""
    term = TERMS[function]
    terms = [term(-t).mean() for t in up] + [term(t).mean() for t in down]
    return sum(terms) / (len(up) if heads == "mean" else 1)


def make(shapes, dtype, device="cpu", scale=2.0):
    return [(scale * torch.randn(shape)).to(device, dtype) for shape in shapes]


def gradients(call, up, down, seed=3.0):
    up, down = ([t.detach().requires_grad_() for t in each] for each in (up, down))
    loss, *rest = call(up, down)
    return loss.detach(), torch.autograd.grad(seed * loss, [*up, *down]), *rest


def check_against_exact(backend, up, down, function="hinge", heads="mean"):
    loss, grads, statistics = gradients(
        lambda u, d: adversarial_loss(u, d, function=function, heads=heads, backend=backend), up, down
    )
    plain = lambda u, d: (in_pytorch(u, d, function, heads),)  # noqa: E731
    exact, exact_grads = gradients(plain, [t.cpu().double() for t in up], [t.cpu().double() for t in down])
    torchs, torch_grads = gradients(plain, [t.cpu().float() for t in up], [t.cpu().float() for t in down])
    assert loss.dtype == torch.float32
    assert_close_to_exact(loss.cpu(), exact, torchs, torch.float32, what="loss")
    for t, ours, a, b in zip((*up, *down), grads, exact_grads, torch_grads, strict=True):
        # Relative to the largest: a gradient is 1/numel, far below the floor for values near 1.
        scale = max(a.abs().max().item(), 1e-30) if a.numel() else 1.0
        b = b.to(t.dtype)
        assert_close_to_exact(ours.cpu().double() / scale, a / scale, b.double() / scale, t.dtype, what="gradient")
        assert ours.dtype == t.dtype
        if backend != "reference":
            assert ours.stride() == torch.empty_like(t).stride()
    return loss, grads, statistics


@on_every_backend
@in_every_dtype
@for_every_function
def test_loss_and_gradients_equal_float64(backend, device, function, dtype):
    up, down = make(SHAPES, dtype, device), make([(3, *s[1:]) for s in SHAPES], dtype, device, scale=9.0)
    check_against_exact(backend, up, down, function)
    check_against_exact(backend, up[:1], (), function, "sum")


@on_every_backend
def test_statistics_are_what_the_logits_say(backend, device):
    up = [torch.tensor([1.0, -2.0, 0.0, 3.0], device=device), torch.tensor([[0.5]], device=device)]
    down = [torch.tensor([-1.0, -1.0, 0.0], device=device), torch.tensor([2.0, -3.0], device=device)]
    _, statistics = adversarial_loss(up, down, backend=backend)
    rows = [
        [(0 + 3 + 1 + 0) / 4, 0.5, 0.5, 0.25, 0.25],
        [0.5, 0.5, 1.0, 0.0, 1.0],
        [1 / 3, -2 / 3, 0.0, 2 / 3, -2 / 3],
        [1.5, -0.5, 0.5, 0.5, 0.0],
    ]
    rows = torch.tensor(rows)
    expected = torch.cat([rows[:2].mean(0, keepdim=True), rows[2:].mean(0, keepdim=True), rows])
    torch.testing.assert_close(statistics.cpu(), expected)
    alone = adversarial_loss(up, backend=backend)[1].cpu()
    torch.testing.assert_close(alone, torch.cat([expected[:1], torch.zeros(1, 5), expected[2:4]]))


@on_every_kernel
@for_every_function
def test_heads_may_differ_in_dtype(backend, device, function):
    up = [make([(7, 33)], dtype, device)[0] for dtype in (torch.float16, torch.float32, torch.bfloat16)]
    check_against_exact(backend, up, up[::-1], function)


@on_every_kernel
@in_every_dtype
def test_dense_logits_in_any_order_and_at_any_address_are_read_in_place(backend, device, dtype):
    late = torch.randn(1 + 5 * 67).to(device, dtype)[1:].view(5, 67)
    views = [late, make([(6, 5, 9)], dtype, device)[0].permute(2, 0, 1), late.t()]
    views.append(torch.randn(2, 3, 4, 5).to(device, dtype, memory_format=torch.channels_last))
    assert explain("adversarial_loss", views, backend=backend).backend == backend
    check_against_exact(backend, views, views, "softplus")


@on_every_kernel
@for_every_function
def test_more_heads_than_one_launch_takes(backend, device, function):
    up = [torch.randn(1 + i % 5, device=device) for i in range(70)]
    check_against_exact(backend, up, up, function)


@on_every_backend
@for_every_function
def test_an_empty_head_contributes_nothing_and_counts_as_a_head(backend, device, function):
    full, empty = torch.randn(5, device=device), torch.zeros(0, 4, device=device)
    loss, grads, statistics = gradients(
        lambda u, d: adversarial_loss(u, d, function=function, backend=backend), [full, empty], [empty, empty]
    )
    alone, alone_grads, _ = gradients(lambda u, d: adversarial_loss(u, function=function, backend=backend), [full], [])
    torch.testing.assert_close(loss, alone / 2)
    torch.testing.assert_close(grads[0], alone_grads[0] / 2)
    assert statistics[3:].abs().sum() == 0
    assert statistics.isfinite().all()


@on_every_backend
@in_every_dtype
def test_all_zero_logits_give_the_corner_s_values(backend, device, dtype):
    zeros = [torch.zeros(4, 3, dtype=dtype, device=device)]
    for function, value, slope in (("hinge", 2.0, 1.0), ("softplus", 2 * 0.69314718, 0.5), ("linear", 0.0, 1.0)):
        loss, grads, statistics = gradients(
            lambda u, d, f=function: adversarial_loss(u, d, function=f, backend=backend), zeros, zeros, seed=1.0
        )
        torch.testing.assert_close(loss.item(), value)
        torch.testing.assert_close(grads[0], torch.full_like(zeros[0], -slope / 12))
        torch.testing.assert_close(grads[1], torch.full_like(zeros[0], slope / 12))
        assert statistics[:, 2:].abs().max() == 0
    ones = [torch.ones(4, dtype=dtype, device=device)]  # exactly at a hinge's corner
    _, grads, _ = gradients(lambda u, d: adversarial_loss(u, backend=backend), ones, [])
    assert grads[0].abs().max() == 0


@on_every_kernel
@in_every_dtype
def test_softplus_is_stable_for_logits_of_every_size(backend, device, dtype):
    logits = torch.tensor([0.0, 1e-4, -1e-4, 20.0, -20.0, 89.0, -89.0, 1e4, -1e4, 6e4, -6e4]).to(device, dtype)
    for each in logits:  # one head per logit: a small loss is not lost beside a large one
        loss, (grad,), _ = gradients(
            lambda u, d: adversarial_loss(u, function="softplus", backend=backend), [each], [], seed=1.0
        )
        wide = each.cpu().double()
        torch.testing.assert_close(loss.cpu().double(), F.softplus(-wide, threshold=1000), rtol=1e-6, atol=1e-37)
        slope = -torch.sigmoid(-wide)
        torch.testing.assert_close(grad.cpu(), slope.to(dtype), rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=1e-30)


@on_every_kernel
@for_every_function
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_gives_what_pytorch_gives(backend, device, function, bad):
    up = [torch.tensor([bad, 0.5], device=device), torch.tensor([1.0], device=device)]
    down = [torch.tensor([2.0], device=device), torch.tensor([bad], device=device)]
    loss, grads, _ = gradients(lambda u, d: adversarial_loss(u, d, function=function, backend=backend), up, down)
    plain, plain_grads = gradients(lambda u, d: (in_pytorch(u, d, function, "mean"),), up, down)
    torch.testing.assert_close(loss, plain, equal_nan=True)
    for a, b in zip(grads, plain_grads):
        torch.testing.assert_close(a, b, equal_nan=True)


@on_every_kernel
def test_only_what_needs_a_gradient_gets_one(backend, device):
    up, down = make([(4, 5), (6,)], torch.float32, device), make([(3,), (2, 2)], torch.float32, device)
    expected = gradients(lambda u, d: adversarial_loss(u, d, backend=backend), up, down, seed=1.0)[1]
    wanted = [up[1].requires_grad_(), down[0].requires_grad_()]
    found = torch.autograd.grad(adversarial_loss(up, down, backend=backend)[0], wanted)
    assert torch.equal(found[0], expected[1])
    assert torch.equal(found[1], expected[2])


@on_every_kernel
def test_only_the_logits_are_saved(backend, device):
    up, down = make([(8, 197)], torch.float16, device), make([(8, 197)], torch.float16, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        adversarial_loss([up[0].requires_grad_()], [down[0].requires_grad_()], backend=backend)
    assert saved == [up[0].data_ptr(), down[0].data_ptr()]


@on_every_kernel
@for_every_function
def test_repeating_a_call_gives_the_same_bits(backend, device, function):
    up, down = make([(40_001,), (8, 197)], torch.float32, device), make([(3,), (70_000,)], torch.bfloat16, device)
    call = lambda u, d: adversarial_loss(u, d, function=function, backend=backend)  # noqa: E731
    first, again = gradients(call, up, down), gradients(call, up, down)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[2], again[2])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1]))


def test_cpu_result_does_not_depend_on_the_number_of_threads():
    up, down = make([(100_003,), (5,)], torch.float32), make([(77,), (70_001,)], torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            loss, grads, statistics = gradients(lambda u, d: adversarial_loss(u, d, backend="cpu"), up, down)
            results.append([loss, *grads, statistics])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in results[1:] for a, b in zip(results[0], run))


# ---- derivatives ----------------------------------------------------------------------------------------------------


@for_every_function
def test_reference_passes_gradcheck_and_gradgradcheck(function):
    logits = [t.requires_grad_() for t in make([(3, 2), (5,), (2, 1), (3,)], torch.float64)]
    call = lambda *t: reference(t, 2, function, 0.5)[0]  # noqa: E731
    assert torch.autograd.gradcheck(call, logits)
    assert torch.autograd.gradgradcheck(call, logits)


@for_every_function
def test_the_gradient_in_pytorch_is_the_reference_s_and_differentiable(function):
    logits = [t.requires_grad_() for t in make([(3, 2), (5,), (2, 1), (3,)], torch.float64)]
    seed = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(1.7 * reference(logits, 2, function, 0.5)[0], logits)
    torch.testing.assert_close(tuple(reference_gradient(seed, logits, 2, function, 0.5)), expected)
    assert torch.autograd.gradcheck(lambda s, *t: reference_gradient(s, t, 2, function, 0.5), (seed, *logits))


@on_every_kernel
def test_a_gradient_penalty_s_second_derivative_equals_float64(backend, device):
    def penalty(x, backend):
        logits = [(x * x).sum(1), (x**3).sum(1, keepdim=True)]
        loss, _ = adversarial_loss(logits, function="softplus", backend=backend)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    x = torch.randn(4, 3)
    ours = penalty(x.to(device).requires_grad_(), backend)
    torch.testing.assert_close(
        ours.cpu().double(), penalty(x.double().requires_grad_(), "reference"), rtol=1e-4, atol=1e-6
    )


# ---- the frameworks around it ---------------------------------------------------------------------------------------


@on_every_kernel
def test_raw_ops_pass_opcheck(backend, device):
    logits = [*make([(2, 3, 5), (7,)], torch.float32, device), *make([(4, 6), ()], torch.float16, device)]
    logits[2] = logits[2].t()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_forward(backend), (logits, 2, "hinge", 0.5), test_utils=tests)
    seed = torch.tensor(2.0, device=device)
    torch.library.opcheck(_backward(backend), (seed, logits, 2, "softplus", 0.5), test_utils=tests)


@pytest.mark.parametrize(
    ("backend", "device", "compiler"),
    [
        ("cpu", "cpu", "inductor"),
        ("reference", "cpu", "aot_eager"),
        pytest.param("cuda", "cuda", "inductor", marks=pytest.mark.gpu),
    ],
)
def test_compiles_into_one_graph_with_its_gradient(backend, device, compiler):
    def step(a, b):
        return adversarial_loss([a * 2, b.flatten()], [b, a], function="softplus", backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    a, b = torch.randn(5, 7, device=device).requires_grad_(), torch.randn(3, 4, device=device).requires_grad_()
    (ours, stats), (plain, plain_stats) = compiled(a, b), step(a, b)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(stats, plain_stats)
    for x, y in zip(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(plain, (a, b))):
        torch.testing.assert_close(x, y)


@on_every_backend
def test_autocast_leaves_the_loss_in_float32(backend, device):
    up = make([(5, 3)], torch.bfloat16, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss, statistics = adversarial_loss(up, backend=backend)
    assert loss.dtype == statistics.dtype == torch.float32
    assert torch.equal(loss, adversarial_loss(up, backend=backend)[0])


@pytest.mark.gpu
def test_is_captured_in_a_cuda_graph():
    up, down = make(SHAPES, torch.float16, "cuda"), make(SHAPES, torch.float32, "cuda")
    seed = torch.ones((), device="cuda")
    forward, backward = _forward("cuda"), _backward("cuda")
    call = lambda: (*forward([*up, *down], 6, "hinge", 1.0), *backward(seed, [*up, *down], 6, "hinge", 1.0))  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for t in (*up, *down):
        t.copy_(torch.randn_like(t))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, call()))


# ---- which backend serves, bad input --------------------------------------------------------------------------------


def test_explain_names_the_choice_and_every_reason():
    explanation = explain("adversarial_loss", [torch.randn(4)], [torch.randn(3)])
    assert explanation.backend == "cpu"
    assert explanation.reasons["cuda"] == ["needs a CUDA tensor, got cpu"]
    assert (
        list(explanation.reasons)
        == [b.name for b in ops()["adversarial_loss"].backends]
        == ["cuda", "cpu", "reference"]
    )
    with pytest.raises(BackendError, match="adversarial_loss: backend 'cuda' cannot serve this call: needs a CUDA"):
        adversarial_loss([torch.randn(4)], backend="cuda")


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        (torch.randn(4, dtype=torch.float64), "float64"),
        (torch.randn(8)[::2], r"up\[1\] has strides"),
        (torch.randn(1).expand(4), "strides"),
    ],
)
def test_what_no_kernel_reads_is_served_by_the_reference(logits, reason):
    up = [torch.randn(3), logits]
    with pytest.raises(BackendError, match=reason):
        adversarial_loss(up, backend="cpu")
    assert explain("adversarial_loss", up).backend == "reference"
    exact = in_pytorch([t.double() for t in up], [], "hinge", "mean")
    torch.testing.assert_close(adversarial_loss(up)[0].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("capability", _native.CPU_CAPABILITIES[:-1])
def test_lower_instruction_sets_pass_the_same_tests(capability):
    environment = {**os.environ, "FASTDISTILL_CPU_CAPABILITY": capability}
    # Those of squared_norm as well: starting a process takes longer than either's tests.
    files = [__file__, __file__.replace("adversarial_loss", "squared_norm")]
    selection = "cpu and (equal_float64 or stable or not_finite or 16_bits) and not reference"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", selection]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize(
    ("up", "down", "settings", "error", "message"),
    [
        (torch.ones(3), [], {}, TypeError, "up: expected a list of tensors, got Tensor"),
        ([], [], {}, ValueError, "up: expected the logits of at least one head, got none"),
        ([torch.ones(3)], [torch.ones(3)] * 2, {}, ValueError, "down: expected as many heads as up, 1, or none; got 2"),
        ([torch.ones(3), 1.0], [], {}, TypeError, r"up\[1\]: expected a tensor, got float"),
        ([torch.ones(3)], [torch.ones(3).int()], {}, TypeError, r"down\[0\]: expected float32, .* got torch.int32"),
        ([torch.ones(3)], [], {"function": "wgan"}, ValueError, "function must be one of hinge, .*; got 'wgan'"),
        ([torch.ones(3)], [], {"heads": "max"}, ValueError, "heads must be 'mean' or 'sum'; got 'max'"),
        ([torch.ones(3)], [torch.ones(3, device="meta")], {}, ValueError, "logits of head 0 are on meta"),
    ],
)
def test_bad_input_names_the_argument_the_value_and_the_need(up, down, settings, error, message):
    with pytest.raises(error, match=message):
        adversarial_loss(up, down, **settings)
