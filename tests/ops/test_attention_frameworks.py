"""attention under what surrounds it: the dispatcher, torch.compile, autocast, CUDA graphs."""

import pytest
import torch

from fastdistill.ops import attention
from fastdistill.ops.attention import _backward, _backward_fake, _forward, _forward_fake
from tests.ops.attention_oracle import (
    COMPILED,
    is_in_token_order,
    lying,
    make,
    on_every_backend,
    on_every_kernel,
    plainly,
    run,
    unsupported,
)


@on_every_kernel
@pytest.mark.parametrize("how", ["head by head", "packed", "late"])
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
