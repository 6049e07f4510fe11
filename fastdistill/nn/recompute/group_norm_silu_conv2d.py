"""GroupNorm + SiLU and the convolution behind them, which does not keep its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastdistill.ops import _dispatch, group_norm_silu
from fastdistill.ops.group_norm_silu import OP, forward, gradients


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
    OP.check(x, num_groups, norm_weight, norm_bias, eps, silu=silu, add=add)
    if x.dim() != 4:
        raise ValueError(f"x: expected (N, C, H, W), got shape {tuple(x.shape)}")
    if isinstance(padding, str):
        raise TypeError(f"padding: expected an int or a pair of them, got {padding!r}")
    norm = (num_groups, eps, silu)
    chosen = _dispatch.select(OP, backend, x, num_groups, norm_weight, norm_bias, eps, silu=silu, add=add)
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
        z, mean, rstd = forward(x, norm_weight, norm_bias, add, *norm, backend)
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
            grads = gradients(grad_z.to(x.dtype), x, norm_weight, norm_bias, add, mean, rstd, *norm, backend)
        return (
            *(g if need else None for g, need in zip(grads, needs_norm)),
            grad_weight.to(conv_weight.dtype) if needs_weight else None,
            grad_bias.to(bias_dtype) if needs_bias else None,
            None,
            None,
            None,
        )
