"""LayerNorm and the linear layers behind it (queries, keys and values, say), which do not keep their input."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastdistill.nn.joint import products
from fastdistill.ops import _dispatch, layer_norm
from fastdistill.ops._autograd import needed
from fastdistill.ops.layer_norm import OP, forward, gradients


def layer_norm_linears(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """`F.linear(y, weight, bias)` of each pair, y = layer_norm(x + residual), keeping the sum but not y.

    Args:
        x, norm_weight, norm_bias, eps, residual: as in `fastdistill.ops.layer_norm`.
        weights, biases: (out, D) and (out,) each, as in `F.linear`; under autocast they are cast as there. One product
            serves parameters that lie side by side in memory.
        backend: of `fastdistill.ops.layer_norm`.

    Returns:
        One (..., out) per weight; with `residual`, the sum (..., D) behind them.

    Raises:
        ValueError: not as many biases (or None) as weights.
        And what `fastdistill.ops.layer_norm` and `F.linear` raise.
    """
    if len(weights) != len(biases):
        raise ValueError(f"biases: expected {len(weights)}, one (or None) per weight, got {len(biases)}")
    OP.check(x, norm_weight, norm_bias, eps, residual=residual)
    chosen = _dispatch.select(OP, backend, x, norm_weight, norm_bias, eps, residual=residual)
    if x.numel() and torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return _LayerNormLinears.apply(
            x, residual, norm_weight, norm_bias, (eps, chosen), len(weights), *weights, *biases
        )
    # For the gradient of y alone linear layers do not keep their input.
    y = layer_norm(x, norm_weight, norm_bias, eps, residual=residual, backend=chosen)
    y, *s = (y,) if residual is None else y
    return *products(y, weights, biases), *s


class _LayerNormLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, norm_weight, norm_bias, norm, count, *weights_and_biases):
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        y, s, mean, rstd = forward(x, residual, norm_weight, norm_bias, *norm)
        outputs = products(y, weights, biases)
        ctx.save_for_backward(s, norm_weight, norm_bias, mean, rstd, *weights)
        ctx.norm, ctx.count = norm, count
        ctx.dtype = outputs[0].dtype  # autocast's where it was on
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        ctx.set_materialize_grads(False)
        return outputs if residual is None else (*outputs, s)

    @staticmethod
    def backward(ctx, *grad_outputs):
        s, norm_weight, norm_bias, mean, rstd, *weights = ctx.saved_tensors
        count, (eps, backend) = ctx.count, ctx.norm
        grad_s = grad_outputs[count] if len(grad_outputs) > count else None
        needs_norm, needs_linears = ctx.needs_input_grad[:4], ctx.needs_input_grad[6:]
        rows = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grad_outputs[:count]]

        grads = [None] * len(needs_linears)
        y = None
        for i, (grad, weight) in enumerate(zip(rows, weights)):
            if grad is not None and needs_linears[i]:
                if y is None:
                    y = layer_norm(s, norm_weight, norm_bias, eps, backend=backend).to(ctx.dtype).flatten(0, -2)
                grads[i] = grad.t().mm(y).to(weight.dtype)
            if grad is not None and needs_linears[count + i]:
                grads[count + i] = grad.sum(0).to(ctx.bias_dtypes[i])
        del y  # before as much is taken for its gradient
        grad_norm = (None,) * 4
        if any(needs_norm):
            grad_norm = _norm_gradients(ctx, rows, weights, grad_s, s, norm_weight, norm_bias, mean, rstd)
        return *needed(grad_norm, needs_norm), None, None, *grads


def _norm_gradients(ctx, rows, weights, grad_s, s, norm_weight, norm_bias, mean, rstd):
    """Of x, residual, norm_weight and norm_bias."""
    products = [grad.mm(weight.to(ctx.dtype)) for grad, weight in zip(rows, weights) if grad is not None]
    if not products:
        return grad_s, grad_s, None, None
    grad_y = sum(products[1:], products[0]).reshape(s.shape).to(s.dtype)
    grad_x, grad_weight, grad_bias = gradients(
        grad_y,
        grad_s,
        s,
        norm_weight,
        mean,
        rstd,
        any(ctx.needs_input_grad[2:4]),
        *ctx.norm,
        bias_dtype=None if norm_bias is None else norm_bias.dtype,
    )
    return grad_x, grad_x, grad_weight, grad_bias
