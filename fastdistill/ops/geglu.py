"""GEGLU: the first half of the last dimension times the GELU of the second. Forward, backward and higher derivatives.

GELU in its exact form, g Phi(g) with the normal distribution function Phi: Hendrycks and Gimpel, arXiv 1606.08415.
GEGLU: Shazeer, arXiv 2002.05202, eq. 6. It is what diffusers' `GEGLU` computes behind its projection, in the
feed-forward of every transformer block of a UNet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastdistill.ops import _dispatch, _kernels
from fastdistill.ops._layout import collapse_rows, like


def geglu(x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """`h * gelu(gate)` with `h, gate = x.chunk(2, -1)`, computed in float32 and rounded once.

    Args:
        x: (..., 2D) with at least one dimension; float32, float16, bfloat16 (every backend) or float64 (reference).
            Read in place when its rows are dense and a single stride leads from each to the next (a slice of a larger
            last dimension, say); other strides go to the reference.
        backend: "cuda", "triton", "cpu" or "reference"; None lets `fastdistill.ops.explain` 's first choice serve.

    Returns:
        (..., D) in x's dtype, dense.

    Derivatives: only x is saved; the first derivative on every backend (a gradient whose rows no single stride walks
    goes to the reference), higher ones in differentiable PyTorch.

    Raises:
        ValueError, TypeError: bad input, naming the argument, before anything is launched.
        BackendError: the backend asked for does not exist or cannot serve the call; the message says why.
    """
    _check(x)
    chosen = _dispatch.select(OP, backend, x)
    if chosen == _dispatch.REFERENCE or x.numel() == 0:
        return reference(x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Geglu.apply(x, chosen)
    return _forward(chosen)(x)


def reference(x: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch, differentiable as often as needed: fallback, oracle of the tests, benchmark baseline.

    16-bit inputs are computed in float32 and rounded once.
    """
    h, gate = _wide(x).chunk(2, -1)
    return (h * F.gelu(gate)).to(x.dtype)


def reference_gradient(grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dL/dx from dL/dy in plain PyTorch, itself differentiable: (gelu(gate), h gelu'(gate)) * grad_y."""
    h, gate = _wide(x).chunk(2, -1)
    grad_y = _wide(grad_y)
    grad_gate = torch.ops.aten.gelu_backward(grad_y * h, gate)
    return like(torch.cat([grad_y * F.gelu(gate), grad_gate], -1).to(x.dtype), x)


def gradient(grad_y: torch.Tensor, x: torch.Tensor, backend: str) -> torch.Tensor:
    """dL/dx (..., 2D) from dL/dy (..., D) on `backend`; where it must be differentiable, in plain PyTorch."""
    needs_graph = torch.is_grad_enabled() and (grad_y.requires_grad or x.requires_grad)
    if needs_graph or backend == _dispatch.REFERENCE or x.numel() == 0 or collapse_rows(grad_y) is None:
        return reference_gradient(grad_y, x)
    return _backward(backend)(grad_y, x)


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.float64 if t.dtype == torch.float64 else torch.float32)


def _check(x) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dim() < 1:
        raise ValueError("x: expected (..., 2D) with at least one dimension, got a tensor of none")
    if x.dtype not in (*_kernels.DTYPES, torch.float64):
        raise TypeError(f"x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.shape[-1] == 0 or x.shape[-1] % 2 != 0:
        raise ValueError(f"x: its last dimension must be even and at least 2, got shape {tuple(x.shape)}")


def _kernel_reasons(x: torch.Tensor) -> list[str]:
    """What no kernel serves, whoever wrote it."""
    reasons = []
    if x.dtype == torch.float64:
        reasons.append("float64 is served by the reference alone")
    rows = collapse_rows(x)
    if rows is None or (rows[0] > 1 and rows[1] < x.shape[-1]):
        reasons.append(f"strides {tuple(x.stride())}: needs dense rows that one stride walks, not overlapping")
    return reasons


# ---- the registered ops: one overload per backend -------------------------------------------------------------------


def _forward_fake(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _backward_fake(grad_y, x):
    return torch.empty_like(x)


def _triton_forward(x):
    from fastdistill.kernels import geglu as kernel

    return kernel.geglu(x)


def _triton_backward(grad_y, x):
    from fastdistill.kernels import geglu as kernel

    return kernel.geglu_backward(grad_y, x)


_kernels.define("geglu", "(Tensor x) -> Tensor", _forward_fake, _triton_forward)
_kernels.define("geglu_backward", "(Tensor grad_y, Tensor x) -> Tensor", _backward_fake, _triton_backward)


def _forward(backend: str):
    return getattr(torch.ops.fastdistill.geglu, backend)


def _backward(backend: str):
    return getattr(torch.ops.fastdistill.geglu_backward, backend)


# ---- autograd -------------------------------------------------------------------------------------------------------


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, backend):
        ctx.save_for_backward(x)
        ctx.backend = backend
        return _forward(backend)(x)

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        return gradient(grad_y, x, ctx.backend), None


OP = _dispatch.register(_dispatch.Op("geglu", _check, _kernels.backends(_kernel_reasons)))
