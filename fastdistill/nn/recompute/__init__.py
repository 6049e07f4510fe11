"""A fused op and the layers behind it as one step of autograd, which does not keep what passes between them.

A layer keeps its input for the gradient of its weight. Here that input is the result of a norm or a product over a
tensor that is kept anyway, so the backward computes it again: one more pass over memory, no matrix product, and the
same bits.

Each backward is written in differentiable calls, so derivatives of every order exist.
"""

from fastdistill.nn.recompute.geglu_linear import geglu_linear
from fastdistill.nn.recompute.group_norm_silu_conv2d import group_norm_silu_conv2d
from fastdistill.nn.recompute.layer_norm_linears import layer_norm_linears

__all__ = ["geglu_linear", "group_norm_silu_conv2d", "layer_norm_linears"]
