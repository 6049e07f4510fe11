"""attention on every backend: numbers against float64, strides, derivatives, compilation, choice, bad input."""

import math
import types
import warnings

import pytest
import torch
import torch.nn.functional as F

from fastdistill.ops import BackendError, attention, attention_sdpa, explain
from fastdistill.ops._dispatch import ops
from fastdistill.ops.attention import _backward, _backward_fake, _forward, _forward_fake
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import in_every_dtype, truncates

BACKENDS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("sdpa", "cpu", id="sdpa-cpu"),
    pytest.param("sdpa:flash", "cpu", id="sdpa:flash-cpu"),
    pytest.param("sdpa:math", "cpu", id="sdpa:math-cpu"),
    pytest.param("triton", "cpu", id="triton-interpreted", marks=pytest.mark.interpreter),
    *(
        pytest.param(name, "cuda", id=name, marks=pytest.mark.gpu)
        for name in ("triton", "sdpa", "sdpa:cudnn", "sdpa:flash", "sdpa:efficient", "sdpa:math")
    ),
]
COMPILED = [b for b in BACKENDS if b.id != "triton-interpreted"]  # torch.compile does not trace into the interpreter
KERNELS = [b for b in BACKENDS if b.values[0] == "triton"]
# Not torch's kernels on a GPU: they add gradients atomically unless told otherwise, and load those that arrive 16 bytes
# at a time wherever they begin.
NOT_TORCHS_ON_GPU = [b for b in BACKENDS if b.values[1] == "cpu" or b.values[0] == "triton"]
on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
on_every_kernel = pytest.mark.parametrize(("backend", "device"), KERNELS)


# (B, H, N, M, D): the head dims of SD1.5, SD2.1, SDXL, ViT-S and the VAE, self and text attention, with few tokens; odd
# numbers of either, one key, one query, one head dim that is no library's favourite.
SHAPES = [
    (2, 2, 64, 64, 40),
    (1, 2, 64, 77, 40),
    (1, 2, 64, 64, 80),
    (1, 2, 33, 77, 80),
    (1, 2, 40, 40, 160),
    (2, 1, 16, 77, 160),
    (1, 3, 64, 64, 64),
    (2, 2, 50, 77, 64),
    (1, 2, 197, 197, 64),
    (1, 1, 48, 48, 512),
    (1, 2, 1, 5, 64),
    (2, 1, 9, 1, 40),
    (1, 1, 131, 259, 8),
    (1, 2, 7, 130, 96),
    (1, 1, 5, 6, 264),
]


def make(shape, dtype=torch.float32, device="cpu", large=1.0):
    """q, k, v as linear layers write them: (B, N, H, D) in memory."""
    batch, heads, queries, keys, width = shape

    def one(tokens):
        return torch.randn(batch, tokens, heads, width).mul(large).to(device, dtype).transpose(1, 2)

    return one(queries), one(keys), one(keys)


def plainly(q, k, v, scale=None):
    """As the textbook writes it, in the dtype of the inputs from end to end."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return torch.softmax((q @ k.mT) * scale, dim=-1) @ v


def run(function, inputs, grad_o):
    """The result and the gradients of q, k and v."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    o = function(*leaves)
    return o.detach(), torch.autograd.grad(o, leaves, grad_o.to(o.device, o.dtype))


def is_in_token_order(t):
    return t.transpose(1, 2).is_contiguous()


def unsupported(backend, *tensors):
    """Of torch's kernels each takes what it takes."""
    return backend.startswith("sdpa") and explain("attention", *tensors).reasons[backend]


def check_against_exact(backend, device, q, k, v, scale=None, grad_o=None):
    if unsupported(backend, q, k, v):
        with pytest.raises(BackendError, match="cannot serve this call"):
            attention(q, k, v, backend=backend)
        return None
    grad_o = torch.randn(q.shape).to(q.dtype) if grad_o is None else grad_o
    o, grads = run(lambda q, k, v: attention(q, k, v, scale=scale, backend=backend), (q, k, v), grad_o.to(device))
    narrow, grad_o = [t.detach().cpu() for t in (q, k, v)], grad_o.cpu()
    exact_o, exact = run(lambda *t: plainly(*t, scale), [t.double() for t in narrow], grad_o)
    torch_o, torchs = run(lambda *t: plainly(*t, scale), narrow, grad_o)
    # A weight is exp(logit - log-sum-exp): each product, their sum, the log-sum-exp and the difference are rounded, and
    # a rounding of the last place of a logit changes the weight by that fraction.
    largest_logit = (narrow[0].double() @ narrow[1].double().mT).abs().max().item() * abs(scale or 0)
    allowed = {"relative": 4 * largest_logit * 2**-24, "whole_ulp": truncates(backend, device, q.dtype)}
    assert_close_to_exact(o.cpu(), exact_o, torch_o, q.dtype, **allowed, what="o")
    for name, ours, exact_, torch_ in zip("qkv", grads, exact, torchs):
        assert ours.dtype == q.dtype
        assert_close_to_exact(ours.cpu(), exact_, torch_, q.dtype, **allowed, what=f"gradient of {name}")
    assert is_in_token_order(o)
    if backend == "triton":
        assert all(map(is_in_token_order, grads))
    return o


@on_every_backend
@in_every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda v: "x".join(map(str, v)))
def test_result_and_gradients_equal_float64(backend, device, shape, dtype):
    check_against_exact(backend, device, *make(shape, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "sdpa", "sdpa:cudnn", "sdpa:flash", "sdpa:efficient"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, 4096, 4096, 40),
        (1, 8, 1024, 77, 80),
        (2, 8, 256, 256, 160),
        (1, 5, 4095, 4095, 64),
        (1, 1, 4096, 4096, 512),
    ],
    ids=lambda v: "x".join(map(str, v)),
)
def test_the_sites_of_the_models_equal_float64(backend, shape):
    check_against_exact(backend, "cuda", *make(shape, torch.bfloat16, "cuda"))


@on_every_backend
@in_every_dtype
@pytest.mark.parametrize("shape", [(1, 2, 40, 77, 40), (1, 1, 70, 300, 64)], ids=["one tile", "several"])
def test_large_logits_stay_finite_and_exact(backend, device, dtype, shape):
    q, k, v = make(shape, dtype, device)
    o = check_against_exact(backend, device, q, k, v, scale=50 / math.sqrt(shape[-1]))
    assert o is None or o.isfinite().all()


@on_every_backend
@pytest.mark.parametrize("keys", [77, 300], ids=["one tile", "several"])
@pytest.mark.parametrize("logit", [-3000.0, 3000.0])
def test_equal_logits_of_any_size_give_the_mean_of_the_values(backend, device, keys, logit):
    _, _, v = make((1, 2, 9, keys, 64), torch.float32, device)
    q, k = torch.full((1, 2, 9, 64), logit / 64, device=device), torch.ones(1, 2, keys, 64, device=device)
    if unsupported(backend, q, k, v):
        return
    o, grads = run(lambda *t: attention(*t, scale=1.0, backend=backend), (q, k, v), torch.ones(q.shape))
    torch.testing.assert_close(o, v.mean(2, keepdim=True).expand_as(o), rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(grads[2], torch.full_like(v, 9 / keys), rtol=3000 * 2**-22, atol=0)


@on_every_backend
def test_one_key_returns_its_value_and_leaves_q_and_k_without_gradient(backend, device):
    q, k, v = make((2, 3, 17, 1, 40), torch.float32, device)
    if unsupported(backend, q, k, v):
        return
    grad_o = torch.randn(q.shape, device=device)
    o, (grad_q, grad_k, grad_v) = run(lambda *t: attention(*t, backend=backend), (q, k, v), grad_o)
    torch.testing.assert_close(o, v.expand_as(o), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_v, grad_o.sum(2, keepdim=True), rtol=1e-5, atol=1e-5)
    assert grad_q.abs().max() < 1e-5
    assert grad_k.abs().max() < 1e-5


@on_every_backend
def test_the_scale_multiplies_the_products(backend, device):
    q, k, v = make((1, 2, 12, 20, 48), torch.float32, device)
    for scale in (0.3, 2, -1.0, 0.0):
        check_against_exact(backend, device, q, k, v, scale=scale)


@on_every_backend
@pytest.mark.parametrize("shape", [(0, 2, 5, 7, 40), (2, 0, 5, 7, 40), (2, 3, 0, 7, 40)], ids=["B", "H", "N"])
def test_nothing_to_compute_gives_an_empty_result_and_zero_gradients(backend, device, shape):
    q, k, v = make(shape, torch.float32, device)
    if unsupported(backend, q, k, v):
        return
    o, grads = run(lambda *t: attention(*t, backend=backend), (q, k, v), torch.empty(q.shape))
    assert o.shape == q.shape
    for gradient, t in zip(grads, (q, k, v)):
        assert gradient.shape == t.shape
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_rounds_once(dtype):
    inputs = make((1, 2, 9, 70, 40), dtype)
    wide = attention(*(t.float() for t in inputs), backend="reference")
    assert torch.equal(attention(*inputs, backend="reference"), wide.to(dtype))


# ---- how tensors lie ------------------------------------------------------------------------------------------------


def lying(how, dtype, device):
    """q, k, v (2, 3, 24, 40) in another order, or as views of something larger."""
    batch, heads, tokens, width = 2, 3, 24, 40
    if how == "packed":
        qkv = torch.randn(batch, tokens, 3, heads, width).to(device, dtype)
        return [t.transpose(1, 2) for t in qkv.unbind(2)]
    if how == "packed per head":
        qkv = torch.randn(batch, tokens, heads, 3, width).to(device, dtype)
        return [t.transpose(1, 2) for t in qkv.unbind(3)]
    if how == "head by head":
        return [torch.randn(batch, heads, tokens, width).to(device, dtype) for _ in range(3)]
    if how == "tokens first":
        return [torch.randn(tokens, batch, heads, width).to(device, dtype).permute(1, 2, 0, 3) for _ in range(3)]
    if how == "one for all samples":
        q, *kv = (torch.randn(b, heads, tokens, width).to(device, dtype) for b in (batch, 1, 1))
        return [q, *(t.expand(batch, -1, -1, -1) for t in kv)]
    if how == "late":
        flat = torch.randn(3, batch * heads * tokens * width + 1).to(device, dtype)
        return [t[1:].view(batch, heads, tokens, width) for t in flat]
    if how == "every other token":
        return [torch.randn(batch, heads, 2 * tokens, width).to(device, dtype)[:, :, ::2] for _ in range(3)]
    raise ValueError(how)


STRIDES = [
    "packed",
    "packed per head",
    "head by head",
    "tokens first",
    "one for all samples",
    "late",
    "every other token",
]


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", STRIDES)
def test_tensors_may_lie_in_any_strides(backend, device, how, dtype):
    check_against_exact(backend, device, *lying(how, dtype, device))


@on_every_kernel
@pytest.mark.parametrize("how", STRIDES)
def test_our_kernels_read_every_order_in_place(backend, device, how):
    q, k, v = lying(how, torch.float32, device)
    assert explain("attention", q, k, v, backend=backend).backend == backend


@on_every_backend
@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_values_of_a_head_that_do_not_lie_side_by_side_are_served_all_the_same(backend, device, which):
    inputs = [*make((1, 2, 10, 12, 40), torch.float32, device)]
    inputs[which] = inputs[which].mT.contiguous().mT
    found = explain("attention", *inputs)
    if backend == "triton":
        assert any("needs the last one to be 1" in reason for reason in found.reasons["triton"])
        assert found.backend != "triton"
    if not found.reasons[backend]:
        check_against_exact(backend, device, *inputs)


@pytest.mark.parametrize(("backend", "device"), NOT_TORCHS_ON_GPU)
@pytest.mark.parametrize("arrival", ["expanded", "head by head", "wider", "transposed"])
def test_the_gradient_may_arrive_in_any_strides(backend, device, arrival):
    q, k, v = make((2, 2, 10, 12, 40), torch.float32, device)
    grad_o = {
        "expanded": torch.tensor(0.7).expand(2, 2, 10, 40),
        "head by head": torch.randn(2, 2, 10, 40),
        "wider": torch.randn(2, 2, 10, 60)[..., 3:43],
        "transposed": torch.randn(2, 2, 40, 10).mT,
    }[arrival]
    check_against_exact(backend, device, q, k, v, grad_o=grad_o)


# ---- derivatives ----------------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("leaf", range(3), ids="qkv")
def test_each_input_alone_may_need_a_gradient(backend, device, leaf):
    inputs = make((1, 2, 20, 30, 40), torch.float32, device)
    if unsupported(backend, *inputs):
        return
    grad_o = torch.randn(1, 2, 20, 40, device=device)
    _, together = run(lambda *t: attention(*t, backend=backend), inputs, grad_o)
    inputs[leaf].requires_grad_()
    (alone,) = torch.autograd.grad(attention(*inputs, backend=backend), inputs[leaf], grad_o)
    torch.testing.assert_close(alone, together[leaf], rtol=1e-6, atol=1e-6)


@on_every_kernel
def test_only_the_tensors_and_the_log_sum_exp_are_saved(backend, device):
    q, k, v = (t.requires_grad_() for t in make((2, 3, 10, 12, 40), torch.bfloat16, device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attention(q, k, v, backend=backend)
    assert [(tuple(t.shape), t.dtype) for t in saved] == [
        ((2, 3, 10, 40), torch.bfloat16),
        ((2, 3, 12, 40), torch.bfloat16),
        ((2, 3, 12, 40), torch.bfloat16),
        ((2, 3, 10, 40), torch.bfloat16),
        ((2, 3, 10), torch.float32),
    ]


@on_every_kernel
@in_every_dtype
@pytest.mark.parametrize("keys", [77, 300])
def test_the_log_sum_exp_is_the_natural_one_in_float32(backend, device, dtype, keys):
    q, k, v = make((1, 2, 20, keys, 40), dtype, device)
    _, lse = _forward(backend)(q, k, v, 0.25)
    exact = torch.logsumexp((q.double() @ k.double().mT) * 0.25, dim=-1)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    # Products of 40 values in float32, from inputs that are exact.
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5 if dtype != torch.float32 else 2e-3)


def test_the_reference_passes_gradcheck_and_gradgradcheck():
    q, k, v = (t.double().requires_grad_() for t in make((1, 2, 3, 4, 5)))
    assert torch.autograd.gradcheck(attention, (q, k, v))
    assert torch.autograd.gradgradcheck(attention, (q, k, v))


@on_every_backend
@pytest.mark.parametrize("leaf", range(3), ids="qkv")
def test_a_second_derivative_exists_on_the_reference_and_is_refused_with_the_alternatives_elsewhere(
    backend, device, leaf
):
    q, k, v = (t.requires_grad_() for t in make((1, 2, 6, 8, 40), torch.float32, device))
    if unsupported(backend, q, k, v):
        return
    o = attention(q, k, v, backend=backend)
    (first,) = torch.autograd.grad(o.square().sum(), (q, k, v)[leaf], create_graph=True)
    _, plain = run(lambda *t: attention(*t, backend=backend), (q, k, v), 2 * o.detach())
    torch.testing.assert_close(first.detach(), plain[leaf], rtol=1e-5, atol=1e-5)
    if backend != "reference":
        with pytest.raises(RuntimeError, match=r'"approximate", "finite_difference"\), or backend="reference"'):
            torch.autograd.grad(first.square().sum(), q)
        return
    (second,) = torch.autograd.grad(first.square().sum(), q)
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    (g,) = torch.autograd.grad(plainly(*leaves).square().sum(), leaves[leaf], create_graph=True)
    (exact,) = torch.autograd.grad(g.square().sum(), leaves[0])
    torch.testing.assert_close(second.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("backend", "device"), NOT_TORCHS_ON_GPU)
@pytest.mark.parametrize("shape", [(2, 2, 70, 77, 40), (1, 2, 130, 300, 64)], ids=["text", "self"])
def test_repeating_a_call_gives_the_same_bits(backend, device, shape):
    inputs = make(shape, torch.float16, device)
    if unsupported(backend, *inputs):
        return
    grad_o = torch.randn(inputs[0].shape)
    runs = [run(lambda *t: attention(*t, backend=backend), inputs, grad_o) for _ in range(3)]
    for o, grads in runs[1:]:
        assert torch.equal(o, runs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][1]))


# ---- the frameworks around it ---------------------------------------------------------------------------------------


@on_every_kernel
@pytest.mark.parametrize("how", ["head by head", "packed"])
def test_raw_ops_pass_opcheck(backend, device, how):
    q, k, v = lying(how, torch.float32, device)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_forward(backend), (q, k, v, 0.2), test_utils=tests)
    o, lse = _forward(backend)(q, k, v, 0.2)
    torch.library.opcheck(_backward(backend), (torch.randn_like(o), q, k, v, o, lse, 0.2), test_utils=tests)


def test_fakes_have_the_order_in_memory_that_the_kernels_promise():
    q, k, v = (t.to("meta") for t in make((2, 3, 5, 7, 40), torch.float16))
    o, lse = _forward_fake(q, k, v, 0.2)
    assert is_in_token_order(o)
    assert (lse.shape, lse.dtype) == ((2, 3, 5), torch.float32)
    for gradient, t in zip(_backward_fake(o, q, k, v, o, lse, 0.2), (q, k, v)):
        assert is_in_token_order(gradient)
        assert (gradient.shape, gradient.dtype) == (t.shape, t.dtype)


@pytest.mark.parametrize(("backend", "device"), [*COMPILED, pytest.param(None, "cpu", id="chosen")])
def test_compiles_into_one_graph_with_dynamic_shapes(backend, device):
    def function(q, k, v):
        return attention(q * 1.0, k, v, backend=backend) + 1

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (4, 7, 9):
        inputs = make((2, 3, tokens, tokens + 5, 40), torch.float32, device)
        if backend and unsupported(backend, *inputs):
            return
        found, plain = (
            run(compiled, inputs, torch.ones_like(inputs[0])),
            run(function, inputs, torch.ones_like(inputs[0])),
        )
        torch.testing.assert_close(found[0], plain[0])
        torch.testing.assert_close(found[1], plain[1])


@pytest.mark.parametrize(("backend", "device"), [b for b in COMPILED if b.id in ("sdpa-cpu", "triton", "sdpa")])
def test_compiles_with_the_default_compiler(backend, device):
    q, k, v = make((2, 3, 9, 11, 40), torch.float32, device)

    def function(q, k, v):
        o = attention(q + 1, k, v, backend=backend)
        return o.transpose(1, 2).flatten(2) * 2

    torch.testing.assert_close(torch.compile(function, fullgraph=True)(q, k, v), function(q, k, v))


@on_every_backend
def test_autocast_casts_the_inputs_and_returns_its_dtype(backend, device):
    q, k, v = make((1, 2, 10, 12, 40), torch.float32, device)
    narrow = [t.to(torch.float16) for t in (q, k, v)]
    if unsupported(backend, *narrow):
        return
    with torch.autocast(device, dtype=torch.float16):
        o = attention(q, k, v, backend=backend)
        assert torch.equal(o, attention(q, k.to(torch.float16), v, backend=backend))
    assert o.dtype == torch.float16
    assert torch.equal(o, attention(*narrow, backend=backend))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with torch.autocast(device, dtype=torch.float16):
        grads = torch.autograd.grad(attention(*leaves, backend=backend).float().sum(), leaves)
    assert {g.dtype for g in grads} == {torch.float32}


def test_autocast_leaves_float64_alone():
    q, k, v = (t.double() for t in make((1, 2, 10, 12, 40)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attention(q, k, v)
    torch.testing.assert_close(o, plainly(q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "sdpa:flash", "sdpa:efficient"])
@pytest.mark.parametrize("keys", [77, 256])
def test_forward_and_backward_are_captured_in_a_cuda_graph(backend, keys):
    leaves = [t.requires_grad_() for t in make((2, 8, 256, keys, 80), torch.float16, "cuda")]
    grad_o = torch.randn_like(leaves[0])

    def step():
        o = attention(*leaves, backend=backend)
        return o, *torch.autograd.grad(o, leaves, grad_o)

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
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


# ---- which backend serves -------------------------------------------------------------------------------------------


def test_explain_names_the_kernel_the_table_and_every_reason():
    q, k, v = make((1, 2, 64, 77, 40), torch.bfloat16)
    explanation = explain("attention", q, k, v)
    assert explanation.backend == "sdpa"
    assert explanation.reasons["sdpa:cudnn"] == ["needs a CUDA tensor, got cpu"]
    assert list(explanation.reasons) == [b.name for b in ops()["attention"].backends]
    assert explain("attention", q=q, k=k, v=v) == explanation
    text = str(explanation)
    assert f"served by sdpa (torch's flash kernel for CPUs, torch {torch.__version__})" in text
    assert "choice: rule 3 of " in text
    assert "default.json (estimates, not measured): triton, sdpa: all keys fit one tile" in text


def test_explain_says_where_a_copy_follows():
    notes = explain("attention", *make((1, 2, 64, 77, 40))).notes
    assert notes["sdpa:math"].endswith("its result is copied to (B, N, H, D) order")
    assert "copied" not in notes["sdpa:flash"]


@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("name", ["sdpa:flash", "sdpa:math"])
def test_a_copy_follows_where_it_is_said_to(name, how):
    q, k, v = lying(how, torch.float32, "cpu")
    with torch.nn.attention.sdpa_kernel(attention_sdpa.KERNELS[name]):
        written = F.scaled_dot_product_attention(q, k, v)
    said = attention_sdpa.describe(name, q, k, v)
    assert is_in_token_order(written) == ("copied" not in said)


def test_what_torch_chooses_is_what_runs():
    q, k, v = make((1, 2, 64, 77, 40))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(q, k, v, backend="sdpa")
        attention(q, k, v, backend="sdpa:math")
    names = [event.name for event in profile.events() if event.name.startswith("aten::_scaled_dot_product")]
    assert attention_sdpa.chosen_by_torch(q, k, v) == "sdpa:flash"
    assert names == ["aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"]


def as_on_a_gpu(monkeypatch, can_use):
    """The reasons for tensors on the CPU, asked as if they were on a GPU."""
    monkeypatch.setattr(attention_sdpa, "_can_use", can_use)

    def reasons(name, *tensors):
        q = types.SimpleNamespace(
            device=torch.device("cuda"), **{n: getattr(tensors[0], n) for n in ("dtype", "shape", "stride")}
        )
        q.data_ptr, q.element_size = tensors[0].data_ptr, tensors[0].element_size
        return attention_sdpa.reasons(name, q, *tensors[1:])

    return reasons


def test_a_kernel_that_torch_refuses_is_refused_in_torchs_words(monkeypatch):
    def refuse(name, *_, debug):
        if debug:
            warnings.warn(f"{name}  needs sm80. (Triggered internally at ../sdp_utils.cpp:1.)", stacklevel=1)
        return False

    inputs = make((1, 2, 3, 4, 40), torch.float16)
    reasons = as_on_a_gpu(monkeypatch, refuse)
    assert reasons("sdpa:flash", *inputs) == ["sdpa:flash needs sm80."]
    assert reasons("sdpa:math", *inputs) == []
    assert reasons("sdpa", *inputs) == []
    reasons = as_on_a_gpu(monkeypatch, lambda *_, debug: False)
    assert reasons("sdpa:cudnn", *inputs) == ["torch says that it cannot, not why"]


def test_what_torch_would_load_from_a_crooked_address_is_refused(monkeypatch):
    reasons = as_on_a_gpu(monkeypatch, lambda *_, debug: True)
    straight = make((1, 2, 3, 4, 40), torch.float16)
    late = lying("late", torch.float16, "cpu")
    wide = [torch.randn(1, 1, 3, 44, dtype=torch.float16)[..., :40]]
    for name in ("sdpa", "sdpa:flash", "sdpa:efficient", "sdpa:cudnn"):
        assert reasons(name, *straight) == []
        assert [reason[:9] for reason in reasons(name, *late)] == ["q begins ", "k begins ", "v begins "]
        (found,) = reasons(name, straight[0], wide[0], straight[2])
        assert "k begins 0 bytes after a multiple of 16, strides (132, 132, 44, 1): needs" in found
    assert reasons("sdpa:math", *late) == []


def test_float64_is_the_references():
    explanation = explain("attention", *(t.double() for t in make((1, 2, 4, 5, 40))))
    assert explanation.backend == "reference"
    assert explanation.reasons["sdpa"] == ["float64 is served by the reference alone"]
    assert "float64 is served by the reference alone" in explanation.reasons["triton"]


@pytest.mark.parametrize("width", [4, 20, 516, 520])
def test_head_dims_that_our_kernels_do_not_take_are_named(width):
    explanation = explain("attention", *make((1, 1, 3, 4, width)))
    assert f"head dim {width}: needs a multiple of 8 up to 512" in explanation.reasons["triton"]
    assert explanation.backend == "sdpa"
    check_against_exact("reference", "cpu", *make((1, 1, 3, 4, width)))


def test_forcing_a_backend_that_cannot_serve_raises_with_its_reasons(monkeypatch):
    inputs = make((1, 1, 3, 4, 40))
    with pytest.raises(BackendError, match="'sdpa:cudnn' cannot serve this call: needs a CUDA tensor, got cpu"):
        attention(*inputs, backend="sdpa:cudnn")
    with pytest.raises(BackendError, match="attention has no backend 'xformers'; it has: sdpa, sdpa:cudnn, "):
        attention(*inputs, backend="xformers")
    monkeypatch.setenv("FASTDISTILL_BACKEND", "attention=sdpa:math")
    assert explain("attention", *inputs).backend == "sdpa:math"
    assert explain("attention", *inputs, backend="sdpa").backend == "sdpa"


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
        ({"q": torch.ones(2, 5, 8)}, ValueError, "q: expected (B, H, N, D), got shape (2, 5, 8)"),
        ({"q": torch.ones(2, 3, 5, 8, dtype=torch.int32)}, TypeError, "q: expected float32, .* got torch.int32"),
        ({"q": torch.ones(2, 3, 5, 0)}, ValueError, "q: needs a head dimension D >= 1, got shape (2, 3, 5, 0)"),
        ({"k": None}, TypeError, "k: expected a tensor, got NoneType"),
        ({"k": torch.ones(2, 3, 8)}, ValueError, "k: expected (B, H, M, D), got shape (2, 3, 8)"),
        ({"k": torch.ones(2, 3, 7, 8).half()}, TypeError, "k: expected q's dtype torch.float32, got torch.float16"),
        ({"k": torch.ones(2, 3, 7, 16)}, ValueError, "k: expected shape (2, 3, M, 8), got (2, 3, 7, 16)"),
        ({"k": torch.ones(2, 1, 7, 8)}, ValueError, "k: expected shape (2, 3, M, 8), got (2, 1, 7, 8)"),
        ({"k": torch.ones(2, 3, 0, 8)}, ValueError, "k: needs at least one key, got shape (2, 3, 0, 8)"),
        ({"k": torch.ones(2, 3, 7, 8, device="meta")}, ValueError, "k: expected on q's device cpu, got meta"),
        ({"v": torch.ones(2, 3, 6, 8)}, ValueError, "v: expected k's shape (2, 3, 7, 8), got (2, 3, 6, 8)"),
        ({"v": torch.ones(2, 3, 7, 4)}, ValueError, "v: expected k's shape (2, 3, 7, 8), got (2, 3, 7, 4)"),
        ({"v": torch.ones(2, 3, 7, 8).bfloat16()}, TypeError, "v: expected q's dtype torch.float32, got"),
        ({"scale": "1"}, TypeError, "scale: expected a float or None, got str"),
        ({"scale": True}, TypeError, "scale: expected a float or None, got bool"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference", "triton"])
def test_bad_input_names_the_argument_the_value_and_the_need(change, error, message, backend):
    message = message.replace("(", r"\(").replace(")", r"\)")
    good = {"q": torch.ones(2, 3, 5, 8), "k": torch.ones(2, 3, 7, 8), "v": torch.ones(2, 3, 7, 8)}
    with pytest.raises(error, match=message):
        attention(**{**good, **change}, backend=backend)


def test_every_backend_of_the_op_is_tested():
    assert {b.values[0] for b in BACKENDS} == {b.name for b in ops()["attention"].backends}
