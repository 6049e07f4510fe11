"""GEGLU and the linear layer behind it, which does not keep their product."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastdistill.ops import _dispatch, geglu
from fastdistill.ops.geglu import OP, gradient


def geglu_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """`F.linear(geglu(x), weight, bias)`, keeping x (..., 2D) and the weight, but not the product (..., D).

    Args:
        x: as in `fastdistill.ops.geglu`.
        weight, bias: (out, D) and (out,), as in `F.linear`; under autocast they are cast as there.
        backend: of `fastdistill.ops.geglu`.

    Returns:
        (..., out).

    Raises:
        What `fastdistill.ops.geglu` and `F.linear` raise.
    """
    OP.check(x)
    chosen = _dispatch.select(OP, backend, x)
    if torch.is_grad_enabled() and weight.requires_grad:
        return _GegluLinear.apply(x, weight, bias, chosen)
    # For the gradient of x alone a linear layer does not keep its input.
    return F.linear(geglu(x, backend=chosen), weight, bias)


class _GegluLinear(torch.autograd.Function):
    """For a weight that needs a gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, backend):
        ctx.save_for_backward(x, weight)
        ctx.backend = backend
        y = F.linear(geglu(x, backend=backend), weight, bias)
        ctx.dtypes = (y.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias, _ = ctx.needs_input_grad
        dtype, bias_dtype = ctx.dtypes  # autocast's where it was on
        rows = grad_y.reshape(-1, grad_y.shape[-1])
        # The weight first: its product is gone before the gradient of the product, as large, comes.
        product = geglu(x, backend=ctx.backend).to(dtype).reshape(-1, weight.shape[1])
        grad_weight = rows.t().mm(product).to(weight.dtype)
        del product
        grad_x = None
        if needs_x:
            grad_product = rows.mm(weight.to(dtype)).reshape(*x.shape[:-1], weight.shape[1])
            grad_x = gradient(grad_product.to(x.dtype), x, ctx.backend)
        grad_bias = rows.sum(0).to(bias_dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None
