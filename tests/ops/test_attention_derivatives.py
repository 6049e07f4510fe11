"""Derivatives of attention: which exist, what is kept for them, the same bits each time."""

import pytest
import torch

from fastdistill.ops import attention
from tests.ops.attention_oracle import (
    NOT_TORCHS_ON_GPU,
    make,
    on_every_backend,
    on_every_kernel,
    plainly,
    run,
    unsupported,
)


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
        alternatives = r'r1_penalty with mode "approximate" or "finite_difference", .*, or backend="reference"'
        with pytest.raises(RuntimeError, match=alternatives):
            torch.autograd.grad(first.square().sum(), q)
        return
    (second,) = torch.autograd.grad(first.square().sum(), q)
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    (g,) = torch.autograd.grad(plainly(*leaves).square().sum(), leaves[leaf], create_graph=True)
    (exact,) = torch.autograd.grad(g.square().sum(), leaves[0])
    torch.testing.assert_close(second.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("backend", "device"), NOT_TORCHS_ON_GPU)
@pytest.mark.parametrize(
    "shape",
    [(2, 2, 70, 77, 40), (1, 1, 33, 77, 160), (1, 1, 70, 300, 64), (1, 1, 20, 33, 512)],
    ids=lambda v: "x".join(map(str, v)),
)
def test_repeating_a_call_gives_the_same_bits(backend, device, shape):
    inputs = make(shape, torch.float16, device)
    if unsupported(backend, *inputs):
        return
    grad_o = torch.randn(inputs[0].shape)
    runs = [run(lambda *t: attention(*t, backend=backend), inputs, grad_o) for _ in range(3)]
    for o, grads in runs[1:]:
        assert torch.equal(o, runs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][1]))
