"""Softmax attention, o = softmax(scale q kᵀ) v, on the backend that the choice table names for its shape.

Attention: Vaswani et al., arXiv 1706.03762, eq. 1. The kernels keep the log-sum-exp of each row instead of the weights
(Dao et al., arXiv 2205.14135), so that nothing of size N x M is stored.
"""

from __future__ import annotations

import functools
import math

import torch

from fastdistill.ops import _dispatch, _kernels, attention_sdpa, attention_table
from fastdistill.ops._autograd import needed
from fastdistill.ops.attention_sdpa import in_token_order


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`softmax(scale * q @ k.mT) @ v`; the softmax in float32, or wider, and one rounding at the end.

    Args:
        q: (B, H, N, D); float32, float16, bfloat16 (every backend) or float64 (reference). Any strides: the kernels
            read views of a packed projection in place, as long as the D values of a head lie side by side.
        k, v: (B, H, M, D) with M >= 1, in q's dtype and on its device. Under autocast all three are cast to its dtype.
        scale: of the products; None for 1 / sqrt(D).
        backend: "triton", "sdpa" (torch chooses the kernel), "sdpa:flash", "sdpa:cudnn", "sdpa:efficient", "sdpa:math"
            or "reference"; None lets the choice table decide (`fastdistill.ops.attention_table`), which
            `fastdistill.ops.explain("attention", q, k, v)` quotes.

    Returns:
        o (B, H, N, D), always in (B, N, H, D) memory order, so that `o.transpose(1, 2).flatten(2)` is a view. A library
        kernel that writes another order is followed by a copy.

    Derivatives: first order in q, k and v on every backend; q, k, v, o and the log-sum-exp are saved. Second order on
    the reference alone: elsewhere it raises, and names the alternatives.

    Raises:
        ValueError, TypeError: bad input, naming the argument, before anything is launched.
        BackendError: the backend asked for does not exist or cannot serve the call; the message says why.
    """
    _check(q, k, v, scale=scale)
    q, k, v = _in_autocast_dtype(q, k, v)
    chosen = _dispatch.select(OP, backend, q, k, v, scale=scale)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if q.numel() == 0:
        return _empty(q, k, v)
    if chosen == _dispatch.REFERENCE:
        return reference(q, k, v, scale)
    needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if chosen == "triton":
        return _Attention.apply(q, k, v, scale, chosen) if needs_gradient else _forward(chosen)(q, k, v, scale)[0]
    if needs_gradient and not torch.compiler.is_compiling():
        q, k, v = _FirstOrder.apply(q, k, v, chosen)
    return attention_sdpa.attention(chosen, q, k, v, scale)


def reference(q, k, v, scale=None):
    """The same in plain PyTorch, differentiable as often as needed: fallback, oracle of the tests.

    16-bit inputs are computed in float32 and rounded once. Stores the N x M weights.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        weights = torch.softmax((q.to(wide) * scale) @ k.to(wide).mT, dim=-1)
        return in_token_order((weights @ v.to(wide)).to(q.dtype))


def _empty(q, k, v):
    """The result for no queries; connected to the inputs, so that their gradients are zeros and not None."""
    o = in_token_order(torch.empty_like(q))
    for t in (q, k, v):
        if t.requires_grad:
            o = o + t.sum().to(o.dtype)
    return o


# ---- autocast -------------------------------------------------------------------------------------------------------


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _dtype(t: torch.Tensor) -> torch.dtype:
    """What t is computed in: its own dtype, or autocast's, which leaves float64 alone."""
    return t.dtype if t.dtype == torch.float64 else _autocast_dtype(t.device) or t.dtype


def _in_autocast_dtype(q, k, v) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = _dtype(q)
    return q.to(dtype), k.to(dtype), v.to(dtype)


# ---- what each backend can serve ------------------------------------------------------------------------------------


def _check(q, k, v, *, scale=None) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if t.dim() != 4:
            raise ValueError(f"{name}: expected (B, H, {'N' if t is q else 'M'}, D), got shape {tuple(t.shape)}")
        if t.dtype not in (*_kernels.DTYPES, torch.float64):
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{name}: expected on q's device {q.device}, got {t.device}")
        if t.dtype != q.dtype and _dtype(t) != _dtype(q):
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {t.dtype}")
    batch, heads, _, width = q.shape
    if width == 0:
        raise ValueError(f"q: needs a head dimension D >= 1, got shape {tuple(q.shape)}")
    keys = k.shape[2]
    if k.shape != (batch, heads, keys, width):
        raise ValueError(f"k: expected shape ({batch}, {heads}, M, {width}), got {tuple(k.shape)}")
    if keys == 0:
        raise ValueError(f"k: needs at least one key, got shape {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")


# What the assembler reports of a head dim of 512 for sm_80 and sm_90; smaller chips have 99 KiB.
_WIDE_HEAD_SHARED = 160 * 1024


@_dispatch.constant
def _shared_memory(index: int) -> int:
    """Bytes that one block may have on a CUDA device."""
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin


def _triton_supports(q, k, v, *, scale=None) -> list[str]:
    if q.device.type == "cuda" or _kernels.interpreting():
        reasons = _kernels.triton_available()
    else:
        reasons = ["needs a CUDA tensor (or TRITON_INTERPRET=1)"]
    reasons = list(reasons)
    if q.dtype == torch.float64:
        reasons.append("float64 is served by the reference alone")
    width = q.shape[-1]
    if width % 8 or width > 512:
        reasons.append(f"head dim {width}: needs a multiple of 8 up to 512")
    if q.device.type == "cuda" and width > 256 and _shared_memory(q.device.index) < _WIDE_HEAD_SHARED:
        reasons.append(f"head dim {width}: its tiles need {_WIDE_HEAD_SHARED >> 10} KiB of shared memory")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(-1) != 1:
            reasons.append(f"{name}'s strides {tuple(t.stride())}: needs the last one to be 1")
    return reasons


def _site(q, k, v) -> attention_table.Site:
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    batch, heads, queries, width = q.shape
    direction = "full" if training else "forward"
    return attention_table.Site(width, queries, k.shape[2], batch * heads, str(_dtype(q))[6:], direction)


def _preferred(q, k, v, *, scale=None) -> tuple[str, ...]:
    return attention_table.preferred(_site(q, k, v), q.device)


def _notes(q, k, v, *, scale=None) -> dict[str, str]:
    """What `explain` adds: the table and its rule, and which library kernel would run."""
    q, k, v = _in_autocast_dtype(q, k, v)
    notes = {"choice": str(attention_table.choose(_site(q, k, v), q.device))}
    for name in attention_sdpa.NAMES:
        if not attention_sdpa.reasons(name, q, k, v):
            notes[name] = attention_sdpa.describe(name, q, k, v, scale)
    return notes


def _sdpa_supports(name, q, k, v, *, scale=None) -> list[str]:
    return attention_sdpa.reasons(name, *_in_autocast_dtype(q, k, v))


def _nothing_against(*_, **__) -> list[str]:
    return []


# ---- the registered ops: one overload per backend that is a kernel of ours ------------------------------------------

# o and the log-sum-exp of each row of scale q kᵀ.
_FORWARD = "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale) -> (Tensor, Tensor, Tensor)"
)


def _empty_in_token_order(t: torch.Tensor) -> torch.Tensor:
    batch, heads, tokens, width = t.shape
    return t.new_empty((batch, tokens, heads, width)).transpose(1, 2)


def _forward_fake(q, k, v, scale):
    return _empty_in_token_order(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_fake(grad_o, q, k, v, o, lse, scale):
    return tuple(_empty_in_token_order(t) for t in (q, k, v))


def _triton_forward(q, k, v, scale):
    from fastdistill.kernels import attention as kernel

    return kernel.attention(q, k, v, scale)


def _triton_backward(grad_o, q, k, v, o, lse, scale):
    from fastdistill.kernels import attention as kernel

    return kernel.attention_backward(grad_o, q, k, v, o, lse, scale)


_kernels.define("attention", _FORWARD, _forward_fake, _triton_forward, names=("triton",))
_kernels.define("attention_backward", _BACKWARD, _backward_fake, _triton_backward, names=("triton",))


def _forward(backend: str):
    return getattr(torch.ops.fastdistill.attention, backend)


def _backward(backend: str):
    return getattr(torch.ops.fastdistill.attention_backward, backend)


# ---- autograd -------------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, backend):
        o, lse = _forward(backend)(q, k, v, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.settings = (scale, backend)
        return o

    @staticmethod
    def backward(ctx, grad_o):
        scale, backend = ctx.settings
        # Under create_graph the gradients must refuse to be differentiated, instead of passing for constants.
        first_order = _AttentionBackward.apply if torch.is_grad_enabled() else _first_order
        return *needed(first_order(grad_o, *ctx.saved_tensors, scale, backend), ctx.needs_input_grad), None, None


def _first_order(grad_o, q, k, v, o, lse, scale, backend):
    # An expanded gradient (of a sum) has no two values side by side.
    grad_o = grad_o if grad_o.stride(-1) == 1 else in_token_order(grad_o.contiguous())
    return _backward(backend)(grad_o, q, k, v, o, lse, scale)


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad_o, q, k, v, o, lse, scale, backend):
        ctx.backend = backend
        return _first_order(grad_o, q, k, v, o, lse, scale, backend)

    @staticmethod
    def backward(ctx, *_):
        raise _no_double_backward(ctx.backend)


class _FirstOrder(torch.autograd.Function):
    """q, k and v as they are; their gradients refuse to be differentiated, before torch's own kernels do in theirs
    with a message that knows no way out."""

    @staticmethod
    def forward(ctx, q, k, v, backend):
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():
            grads = _Refusal.apply(ctx.backend, *grads)
        return *grads, None


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, *grads):
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return tuple(None if g is None else g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx, *_):
        raise _no_double_backward(ctx.backend)


def _no_double_backward(backend: str) -> RuntimeError:
    return RuntimeError(
        f"attention on backend {backend!r} has first derivatives only. For a gradient penalty use "
        'fastdistill.losses.r1_penalty with mode "approximate" or "finite_difference", which need no second one, '
        'or backend="reference", which has them'
    )


OP = _dispatch.register(
    _dispatch.Op(
        "attention",
        _check,
        (
            *(
                _dispatch.Backend(name, functools.partial(_sdpa_supports, name), attention_sdpa.available(name))
                for name in attention_sdpa.NAMES
            ),
            _dispatch.Backend("triton", _triton_supports, _kernels.triton_available, "cuda"),
            _dispatch.Backend(_dispatch.REFERENCE, _nothing_against),
        ),
        tensor="q",
        preferred=_preferred,
        notes=_notes,
    )
)
