"""attention where numbers or sizes are extreme: large logits, one key, nothing at all."""

import math

import pytest
import torch

from fastdistill.ops import attention
from tests.ops.attention_oracle import check_against_exact, make, on_every_backend, run, unsupported
from tests.ops.backends import in_every_dtype


@on_every_backend
@in_every_dtype
@pytest.mark.parametrize(
    "shape",
    [(1, 2, 40, 77, 40), (1, 1, 33, 77, 160), (1, 1, 70, 300, 64), (1, 1, 20, 33, 512)],
    ids=lambda v: "x".join(map(str, v)),
)
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
