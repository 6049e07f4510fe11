"""A fused op and the layer behind it as one step of autograd, which does not keep what passes between them.

A layer keeps its input for the gradient of its weight. Here that input is the result of a pointwise op over a tensor
that is kept anyway, so the backward computes it again: one more pass over memory, no matrix product, and the same bits.

Each backward is written in differentiable calls, so derivatives of every order exist.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastdistill.ops import _dispatch, geglu, group_norm_silu
from fastdistill.ops.geglu import OP as GEGLU_OP
from fastdistill.ops.geglu import gradient as geglu_gradient
from fastdistill.ops.group_norm_silu import OP as GROUP_NORM_SILU_OP
from fastdistill.ops.group_norm_silu import forward as group_norm_silu_forward
from fastdistill.ops.group_norm_silu import gradients as group_norm_silu_gradients


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
    GEGLU_OP.check(x)
    chosen = _dispatch.select(GEGLU_OP, backend, x)
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
            grad_x = geglu_gradient(grad_product.to(x.dtype), x, ctx.backend)
        grad_bias = rows.sum(0).to(bias_dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None


def group_norm_silu_conv2d(
    x: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    silu: bool = True,
    add: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`F.conv2d(group_norm_silu(x, …), conv_weight, …)`, keeping x and the statistics, but not the convolution's input.

    The backward runs the op's public forward again for that input: the same bits, and differentiable in turn. It takes
    the statistics a second time, which costs a read of x where a group does not fit on chip; a kernel that applied the
    kept ones would be one more on every backend.

    Args:
        x: (N, C, H, W); num_groups, norm_weight, norm_bias, eps, silu, add: as in `fastdistill.ops.group_norm_silu`.
        conv_weight, conv_bias, stride, padding, dilation, groups: as in `F.conv2d`, padding in numbers; under autocast
            they are cast as there.
        backend: of `fastdistill.ops.group_norm_silu`.

    Returns:
        What `F.conv2d` returns.

    Raises:
        ValueError: x is not (N, C, H, W). TypeError: padding is a word.
        And what `fastdistill.ops.group_norm_silu` and `F.conv2d` raise.
    """
    GROUP_NORM_SILU_OP.check(x, num_groups, norm_weight, norm_bias, eps, silu=silu, add=add)
    if x.dim() != 4:
        raise ValueError(f"x: expected (N, C, H, W), got shape {tuple(x.shape)}")
    if isinstance(padding, str):
        raise TypeError(f"padding: expected an int or a pair of them, got {padding!r}")
    norm = (num_groups, eps, silu)
    chosen = _dispatch.select(
        GROUP_NORM_SILU_OP, backend, x, num_groups, norm_weight, norm_bias, eps, silu=silu, add=add
    )
    convolution = (_pair(stride), _pair(padding), _pair(dilation), groups)
    if x.shape[0] == 0 or not torch.is_grad_enabled():
        z = group_norm_silu(x, num_groups, norm_weight, norm_bias, eps, silu=silu, add=add, backend=chosen)
        return F.conv2d(z, conv_weight, conv_bias, *convolution)
    # Also for a weight without a gradient: a convolution keeps its input whatever it is asked for.
    return _GroupNormSiLUConv2d.apply(x, norm_weight, norm_bias, add, conv_weight, conv_bias, norm, convolution, chosen)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


class _GroupNormSiLUConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, add, conv_weight, conv_bias, norm, convolution, backend):
        z, mean, rstd = group_norm_silu_forward(x, norm_weight, norm_bias, add, *norm, backend)
        y = F.conv2d(z, conv_weight, conv_bias, *convolution)
        ctx.save_for_backward(x, norm_weight, norm_bias, add, mean, rstd, conv_weight)
        ctx.settings = (norm, convolution, backend)
        ctx.dtypes = (y.dtype, None if conv_bias is None else conv_bias.dtype)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, norm_weight, norm_bias, add, mean, rstd, conv_weight = ctx.saved_tensors
        norm, (stride, padding, dilation, groups), backend = ctx.settings
        needs_norm, (needs_weight, needs_bias) = ctx.needs_input_grad[:4], ctx.needs_input_grad[4:6]
        dtype, bias_dtype = ctx.dtypes  # autocast's where it was on
        num_groups, eps, silu = norm
        if needs_weight:
            z = group_norm_silu(x, num_groups, norm_weight, norm_bias, eps, silu=silu, add=add, backend=backend)
            z = z.to(dtype)
        else:
            z = torch.empty_like(x, dtype=dtype)  # only its shape and layout are read
        grad_z, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_y,
            z,
            conv_weight.to(dtype),
            None if bias_dtype is None else [conv_weight.shape[0]],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [any(needs_norm), needs_weight, needs_bias],
        )
        del z
        grads = (None,) * 4
        if any(needs_norm):
            grads = group_norm_silu_gradients(
                grad_z.to(x.dtype), x, norm_weight, norm_bias, add, mean, rstd, *norm, backend
            )
        return (
            *(g if need else None for g, need in zip(grads, needs_norm)),
            grad_weight.to(conv_weight.dtype) if needs_weight else None,
            grad_bias.to(bias_dtype) if needs_bias else None,
            None,
            None,
            None,
        )
