"""What the tests of attention have in common: its backends, inputs in every order in memory, the exact result."""

import math

import pytest
import torch

from fastdistill.ops import BackendError, attention, explain
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import truncates

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
STRIDES = [
    "packed",
    "packed per head",
    "head by head",
    "tokens first",
    "one for all samples",
    "late",
    "every other token",
]


def make(shape, dtype=torch.float32, device="cpu", large=1.0):
    """q, k, v as linear layers write them: (B, N, H, D) in memory."""
    batch, heads, queries, keys, width = shape

    def one(tokens):
        return torch.randn(batch, tokens, heads, width).mul(large).to(device, dtype).transpose(1, 2)

    return one(queries), one(keys), one(keys)


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
