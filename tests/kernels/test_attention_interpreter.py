"""The Triton kernels of attention in Triton's interpreter: every regime, against float64.

Here the limits are lowered so that few keys take the ways that many take.
"""

import math

import pytest
import torch
from fastdistill.bench.accuracy import allowed_error
from fastdistill.kernels import attention as op
from fastdistill.kernels.attention import backward, forward, tiles
from fastdistill.kernels.launch import run_all

from tests.ops.accuracy import assert_close_to_exact

pytestmark = pytest.mark.interpreter

NAMES = ("o", "lse", "grad_q", "grad_k", "grad_v")
REGIMES = ("as chosen", "many keys", "many keys, split", "two parts of the head, split")


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch):
    if request.param != "as chosen":
        monkeypatch.setattr(tiles, "MAX_SHORT_KEYS", 0)
        monkeypatch.setattr(tiles, "MAX_SHORT_BACKWARD_KEYS", 0)
        monkeypatch.setattr(tiles, "_forward_limits", lambda problem: (16, 16))
        monkeypatch.setattr(tiles, "_backward_limits", lambda problem: (16, 16, 4))
    if "split" in request.param:
        monkeypatch.setattr(tiles, "TILES_PER_SPLIT", 1)
    else:
        monkeypatch.setattr(tiles, "TILES_PER_SPLIT", 1000)
    if "parts" in request.param:
        for limit in ("FORWARD", "BACKWARD", "UNALIGNED"):
            monkeypatch.setattr(tiles, f"MAX_UNDIVIDED_{limit}", 16)
        monkeypatch.setattr(backward, "chunk", lambda problem: 16)
    return request.param


def inputs(queries, keys, head_dim, dtype=torch.float32, batch=1, heads=2):
    """q, k, v, grad_o."""
    return [torch.randn(batch, heads, rows, head_dim).to(dtype) for rows in (queries, keys, keys, queries)]


def run(q, k, v, grad_o, scale):
    """What `NAMES` says."""
    o, lse = op.attention(q, k, v, scale)
    return o, lse, *op.attention_backward(grad_o, q, k, v, o, lse, scale)


def in_pytorch(q, k, v, grad_o, scale, dtype=torch.float64):
    q, k, v, grad_o = (t.detach().to(dtype).requires_grad_() for t in (q, k, v, grad_o))
    logits = q @ k.mT * scale
    o = logits.softmax(-1) @ v
    return o.detach(), logits.detach().logsumexp(-1), *torch.autograd.grad(o, (q, k, v), grad_o)


def check(q, k, v, grad_o, scale=None, ours=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ours = run(q, k, v, grad_o, scale) if ours is None else ours
    exact, in_float32, in_dtype = (
        in_pytorch(q, k, v, grad_o, scale, dtype) for dtype in (torch.float64, torch.float32, q.dtype)
    )
    for name, value, exact_, torch32, torchs in zip(NAMES, ours, exact, in_float32, in_dtype):
        is_lse = name == "lse"
        assert value.dtype == (torch.float32 if is_lse else q.dtype), name
        assert_close_to_exact(
            value,
            exact_,
            torch32 if is_lse else torchs,
            value.dtype,
            whole_ulp=value.dtype == torch.bfloat16,
            what=name,
        )
    return ours


def is_rows_first(t):
    return t.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "dtype"),
    [
        (18, 49, 40, torch.float32),
        (17, 40, 24, torch.float16),
        (17, 1, 8, torch.float32),
        (1, 47, 80, torch.bfloat16),
    ],
)
def test_every_regime_equals_float64(regime, queries, keys, head_dim, dtype):
    o, lse, *grads = check(*inputs(queries, keys, head_dim, dtype))
    assert all(is_rows_first(t) for t in (o, *grads))
    assert lse.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"),
    [
        (65, 77, 40),
        (40, 77, 64),
        (70, 130, 64),
        (33, 77, 160),
        (35, 66, 80),
        (20, 128, 96),
        (7, 40, 512),
        (5, 37, 328),
        (16, 16, 192),
        (1, 1, 8),
    ],
)
def test_the_chosen_tiles_equal_float64(queries, keys, head_dim, dtype):
    check(*inputs(queries, keys, head_dim, dtype, heads=1))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_logits_stay_finite_and_cost_what_lse_costs(regime, dtype, sign):
    q, k, v, grad_o = inputs(20, 40, 24, dtype)
    scale = sign * 50 * 24**-0.5
    ours = run(q, k, v, grad_o, scale)
    exact, in_dtype = (in_pytorch(q, k, v, grad_o, scale, d) for d in (torch.float64, dtype))
    # A float32 lse, and a float32 logit, are known to half a unit in the last place of their size.
    units = exact[1].abs().max().item() * torch.finfo(torch.float32).eps
    for name, value, exact_, torch_ in zip(NAMES, ours, exact, in_dtype):
        assert value.isfinite().all(), name
        largest = exact_.abs().max().item()
        bound = allowed_error((torch_.double() - exact_).abs().max().item(), largest, dtype) + 2 * units * largest
        assert (value.double() - exact_).abs().max().item() <= bound, name


def test_packed_and_transposed_inputs_are_read_in_place(regime):
    batch, heads, rows, head_dim = 2, 2, 18, 24
    packed = torch.full((batch, rows, 3 * heads * head_dim + 8), float("nan"))
    values = torch.randn(batch, rows, 3 * heads * head_dim)
    packed[..., : 3 * heads * head_dim] = values
    q, k, v = packed[..., : 3 * heads * head_dim].unflatten(-1, (3, heads, head_dim)).permute(2, 0, 3, 1, 4)
    grad_o = torch.randn(rows, batch, heads, head_dim).permute(1, 2, 0, 3)
    check(q, k, v, grad_o)


def test_unaligned_and_expanded_inputs_are_read_in_place(regime):
    q = torch.randn(1, 2, 19, 25)[..., 1:]
    k, v = (torch.randn(1, 1, 35, 24).expand(1, 2, 35, 24) for _ in range(2))
    grad_o = torch.randn(24).expand(1, 2, 19, 24)
    check(q, k, v, grad_o)


def test_nothing_is_read_beside_the_rows_or_before_it_is_written(regime):
    # The inputs are parts of larger tensors of NaN, and every result and workspace is full of NaN before.
    def inside(values):
        rows, head_dim = values.shape[2:]
        around = torch.full((*values.shape[:2], rows + 9, head_dim + 16), float("nan"))
        return around[:, :, 3 : 3 + rows, 8 : 8 + head_dim].copy_(values)

    q, k, v, grad_o = (inside(t) for t in inputs(19, 37, 40))
    scale = 40**-0.5

    def run_poisoned(launches, outputs, given):
        for launch in launches:
            for value in launch.arguments.values():
                if isinstance(value, torch.Tensor) and not any(value is t for t in given):
                    value.fill_(float("nan"))
        run_all(launches, q.device)
        return outputs

    given = (q, k, v, grad_o)
    o, lse = run_poisoned(*forward.plan_forward(q, k, v, scale), given)
    grads = run_poisoned(*backward.plan_backward(grad_o, q, k, v, o, lse, scale), (*given, o, lse))
    check(q, k, v, grad_o, scale, (o, lse, *grads))


def test_a_bad_query_stays_in_its_row_and_a_bad_head_in_its_head(regime):
    q, k, v, grad_o = inputs(20, 33, 24)
    q[0, 1, 4, 3] = float("nan")
    o, lse, grad_q, grad_k, grad_v = run(q, k, v, grad_o, 0.2)
    own = torch.arange(20) == 4
    for value in (o, lse[..., None], grad_q):
        assert value[0, 1, own].isnan().all()
        assert value[0, 1, ~own].isfinite().all()
        assert value[0, 0].isfinite().all()
    for value in (grad_k, grad_v):
        assert value[0, 1].isnan().all()
        assert value[0, 0].isfinite().all()


def test_one_key_gives_its_value_and_no_gradient_of_the_weights(regime):
    q, k, v, grad_o = inputs(20, 1, 24)
    o, lse, grad_q, grad_k, _ = run(q, k, v, grad_o, 0.5)
    assert torch.equal(o, v.expand_as(o))
    assert torch.allclose(lse, (q * k).sum(-1) * 0.5, atol=1e-6)
    assert grad_q.abs().max() < 1e-5
    assert grad_k.abs().max() < 1e-4


def test_equal_logits_give_the_mean(regime):
    q, k, v, grad_o = inputs(20, 50, 24)
    o, lse, *_ = run(torch.zeros_like(q), k, v, grad_o, 0.2)
    assert torch.allclose(o, v.mean(2, keepdim=True).expand_as(o), atol=1e-6)
    assert (lse - math.log(50)).abs().max() < 1e-6


def test_the_same_call_gives_the_same_bits(regime):
    call = (*inputs(19, 34, 24, torch.float16), 0.2)
    for name, a, b in zip(NAMES, run(*call), run(*call)):
        assert torch.equal(a, b), name


def test_the_regimes_are_what_they_are_called(regime):
    q, k, v, grad_o = inputs(32, 77, 40, torch.float16)
    launches, (o, lse) = forward.plan_forward(q, k, v, 0.2)
    launches += backward.plan_backward(grad_o, q, k, v, o, lse, 0.2)[0]
    names = [launch.kernel.__name__ for launch in launches]
    if regime == "as chosen":
        assert names[:2] == ["forward_short_kernel", "backward_short_kernel"]
    elif "split" in regime:
        assert names == [
            "_forward_kernel",
            "_combine_kernel",
            "_backward_queries_kernel",
            "_backward_keys_kernel",
            "_sum_splits_kernel",
        ]
    else:
        assert names == ["_forward_kernel", "_backward_queries_kernel", "_backward_keys_kernel"]
    parts = {launch.constexprs["PARTS"] for launch in launches if "PARTS" in launch.constexprs}
    assert parts == {2 if "parts" in regime else 1}
