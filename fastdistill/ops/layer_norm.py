"""LayerNorm over the last dimension, with the residual sum in front of it in the same op.

LayerNorm: Ba, Kiros and Hinton, arXiv 1607.06450, eq. 4. In diffusion transformers blocks `hidden + block(hidden)` is
followed by the next block's norm: `layer_norm(block(hidden), …, residual=hidden)` reads both once and returns both the
norm and the sum.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastdistill.ops import _dispatch, _kernels
from fastdistill.ops._autograd import needed, through_pytorch
from fastdistill.ops._layout import collapse_rows, like


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`layer_norm(s, (D,), weight, bias, eps)` of s = x, or of s = x + residual; computed in float32, rounded once.

    Args:
        x: (..., D) with at least one dimension; float32, float16, bfloat16 (every backend) or float64 (reference).
            Read in place when its rows are dense and a single stride leads from each to the next (a slice of a larger
            last dimension, say); other strides go to the reference.
        weight, bias: (D,), in x's dtype or float32; None for 1 and 0.
        eps: added to the variance (biased, over the D values of a row).
        residual: like x (shape and dtype), added to it before the norm; the sum is rounded to x's dtype, as
            `x + residual` is.
        backend: "cuda", "triton", "cpu" or "reference"; None lets `fastdistill.ops.explain` 's first choice serve.

    Returns:
        y, a tensor like x: same shape, dtype and layout. With `residual`: (y, s).

    Derivatives: first order in x, residual, weight and bias on every backend; s (or x), weight and the float32 mean and
    rstd of each row are saved, nothing else. Gradients of y and of s are taken together; one whose rows are not dense,
    or that no single stride walks, goes to the reference. Double backward is evaluated in differentiable PyTorch.

    Raises:
        ValueError, TypeError: bad input, naming the argument, before anything is launched.
        BackendError: the backend asked for does not exist or cannot serve the call; the message says why.
    """
    _check(x, weight, bias, eps, residual=residual)
    chosen = _dispatch.select(OP, backend, x, weight, bias, eps, residual=residual)
    if x.numel() == 0:
        return _empty(x, weight, bias, residual)
    if chosen == _dispatch.REFERENCE:
        return reference(x, weight, bias, eps, residual=residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        return _LayerNorm.apply(x, residual, weight, bias, eps, chosen)
    y, s, _, _ = _forward(chosen)(x, residual, weight, bias, eps)
    return y if residual is None else (y, s)


def reference(x, weight=None, bias=None, eps=1e-5, *, residual=None):
    """The same in plain PyTorch, differentiable as often as needed: fallback, oracle of the tests, benchmark baseline.

    16-bit inputs are computed in float32 and rounded once.
    """
    s = x if residual is None else like(x + residual, x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    y = like(F.layer_norm(s.to(wide), s.shape[-1:], weight, bias, eps).to(x.dtype), x)
    return y if residual is None else (y, s)


def _empty(x, weight, bias, residual):
    """The result for no rows; connected to the inputs, so that their gradients are zeros and not None."""
    y = torch.empty_like(x)
    for p in (x, residual, weight, bias):
        if p is not None and p.requires_grad:
            y = y + p.sum().to(y.dtype)
    return y if residual is None else (y, x + residual)


# ---- what each backend can serve ------------------------------------------------------------------------------------


def _check(x, weight=None, bias=None, eps=1e-5, *, residual=None) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dim() < 1:
        raise ValueError("x: expected (..., D) with at least one dimension, got a tensor of none")
    if x.dtype not in (*_kernels.DTYPES, torch.float64):
        raise TypeError(f"x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.shape[-1] == 0:
        raise ValueError(f"x: needs at least one value to normalise over, got shape {tuple(x.shape)}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a float, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:  # NaN compares false
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
    for name, p in (("weight", weight), ("bias", bias), ("residual", residual)):
        if p is None:
            continue
        if not isinstance(p, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {type(p).__name__}")
        shape = x.shape if p is residual else x.shape[-1:]
        if p.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(p.shape)}")
        if p is residual and p.dtype != x.dtype:
            raise TypeError(f"residual: expected x's dtype {x.dtype}, got {p.dtype}")
        if p.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name}: expected x's dtype {x.dtype} or torch.float32, got {p.dtype}")
        if p.device != x.device:
            raise ValueError(f"{name}: expected on x's device {x.device}, got {p.device}")


def _kernel_reasons(x: torch.Tensor, *_, residual: torch.Tensor | None = None, **__) -> list[str]:
    """What no kernel serves, whoever wrote it."""
    reasons = []
    if x.dtype == torch.float64:
        reasons.append("float64 is served by the reference alone")
    rows = collapse_rows(x)
    if rows is None or (rows[0] > 1 and rows[1] < x.shape[-1]):
        reasons.append(f"strides {tuple(x.stride())}: needs dense rows that one stride walks, not overlapping")
    if residual is not None and collapse_rows(residual) is None:
        reasons.append(f"residual's strides {tuple(residual.stride())}: needs dense rows that one stride walks")
    return reasons


# ---- the registered ops: one overload per backend -------------------------------------------------------------------

# y, s, mean, rstd; s has no elements where there is no residual: it is x.
_FORWARD = "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
# The gradients of x (which is residual's as well), weight and bias; the last two have no elements unless `parameters`.
_BACKWARD = (
    "(Tensor grad_y, Tensor? grad_s, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, bool parameters)"
    " -> (Tensor, Tensor, Tensor)"
)


def _forward_fake(x, residual, weight, bias, eps):
    s = x.new_empty((0,), dtype=torch.float32) if residual is None else torch.empty_like(x)
    mean = x.new_empty((x.numel() // x.shape[-1],), dtype=torch.float32)
    return torch.empty_like(x), s, mean, torch.empty_like(mean)


def _backward_fake(grad_y, grad_s, s, weight, mean, rstd, parameters):
    grad_weight = s.new_empty((s.shape[-1] if parameters else 0,), dtype=torch.float32)
    return torch.empty_like(s), grad_weight, torch.empty_like(grad_weight)


def _triton_forward(x, residual, weight, bias, eps):
    from fastdistill.kernels import layer_norm as kernel

    return kernel.layer_norm(x, residual, weight, bias, eps)


def _triton_backward(grad_y, grad_s, s, weight, mean, rstd, parameters):
    from fastdistill.kernels import layer_norm as kernel

    return kernel.layer_norm_backward(grad_y, grad_s, s, weight, mean, rstd, parameters)


_kernels.define("layer_norm", _FORWARD, _forward_fake, _triton_forward)
_kernels.define("layer_norm_backward", _BACKWARD, _backward_fake, _triton_backward)


def _forward(backend: str):
    return getattr(torch.ops.fastdistill.layer_norm, backend)


def _backward(backend: str):
    return getattr(torch.ops.fastdistill.layer_norm_backward, backend)


# ---- autograd -------------------------------------------------------------------------------------------------------


class _LayerNorm(torch.autograd.Function):
    """y, or (y, s) with a residual: then a second derivative reaches x and residual as a gradient of s."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, backend):
        y, s, mean, rstd = forward(x, residual, weight, bias, eps, backend)
        ctx.save_for_backward(s, weight, mean, rstd)
        ctx.settings = (eps, backend)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, s)

    @staticmethod
    def backward(ctx, grad_y, grad_s=None):
        if grad_y is None:  # y took no part, so neither did weight and bias
            return *needed((grad_s, grad_s), ctx.needs_input_grad), None, None, None, None
        s, weight, mean, rstd = ctx.saved_tensors
        parameters = any(ctx.needs_input_grad[2:4])
        call = (grad_y, grad_s, s, weight, mean, rstd, parameters, *ctx.settings)
        grad_x, grad_weight, grad_bias = gradients(*call, bias_dtype=ctx.bias_dtype)
        return *needed((grad_x, grad_x, grad_weight, grad_bias), ctx.needs_input_grad), None, None


def forward(x, residual, weight, bias, eps, backend):
    """(y, s, mean, rstd) on `backend`, outside autograd; the reference has no statistics to keep: None."""
    if backend == _dispatch.REFERENCE:
        y = reference(x, weight, bias, eps, residual=residual)
        return (y, x, None, None) if residual is None else (*y, None, None)
    y, s, mean, rstd = _forward(backend)(x, residual, weight, bias, eps)
    return y, x if residual is None else s, mean, rstd


def gradients(grad_y, grad_s, s, weight, mean, rstd, parameters, eps, backend, *, bias_dtype):
    """Those of s, weight and bias on `backend`, given what `forward` returned; of s alone without `parameters`.

    bias_dtype: None where there is no bias.
    """
    # Under create_graph the gradients must themselves be differentiable.
    first_order = _LayerNormBackward.apply if torch.is_grad_enabled() else _first_order
    grad_x, grad_weight, grad_bias = first_order(grad_y, grad_s, s, weight, mean, rstd, parameters, eps, backend)
    if not parameters:
        return grad_x, None, None
    return (
        grad_x,
        None if weight is None else grad_weight.to(weight.dtype),
        None if bias_dtype is None else grad_bias.to(bias_dtype),
    )


class _LayerNormBackward(torch.autograd.Function):
    """The gradients of one call as a function of (grad_y, grad_s, s, weight), differentiable in turn."""

    @staticmethod
    def forward(ctx, grad_y, grad_s, s, weight, mean, rstd, parameters, eps, backend):
        ctx.save_for_backward(grad_y, grad_s, s, weight)
        ctx.settings = (parameters, eps)
        ctx.set_materialize_grads(False)
        return _first_order(grad_y, grad_s, s, weight, mean, rstd, parameters, eps, backend)

    @staticmethod
    def backward(ctx, *grad_grads):
        def gradients(*inputs):
            return _reference_backward(*inputs, *ctx.settings)

        grads = through_pytorch(gradients, ctx.saved_tensors, grad_grads)
        return *needed(grads, ctx.needs_input_grad), None, None, None, None, None


def _first_order(grad_y, grad_s, s, weight, mean, rstd, parameters, eps, backend):
    if backend == _dispatch.REFERENCE or any(g is not None and collapse_rows(g) is None for g in (grad_y, grad_s)):
        return _reference_backward(grad_y, grad_s, s, weight, parameters, eps)
    grad_x, *per_column = _backward(backend)(grad_y, grad_s, s, weight, mean, rstd, parameters)
    return grad_x, *(per_column if parameters else (None, None))


def _reference_backward(grad_y, grad_s, s, weight, parameters, eps):
    """The same in differentiable PyTorch: for gradients that no kernel reads, and for derivatives of the gradients."""
    wide = torch.float64 if s.dtype == torch.float64 else torch.float32
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        ones = s.new_ones(s.shape[-1:], dtype=wide)
        inputs = [
            (t if create_graph and t.requires_grad else t.detach().requires_grad_()).to(wide)
            for t in (s, ones if weight is None else weight)
        ]
        bias = torch.zeros_like(ones).requires_grad_()
        wanted = [*inputs, bias] if parameters else inputs[:1]
        y = reference(*inputs, bias, eps)
        grad_x, *per_column = torch.autograd.grad(y, wanted, grad_y.to(wide), create_graph=create_graph)
    grad_x = grad_x if grad_s is None else grad_x + grad_s
    return like(grad_x.to(s.dtype), s), *(per_column or (None, None))


OP = _dispatch.register(_dispatch.Op("layer_norm", _check, _kernels.backends(_kernel_reasons)))
