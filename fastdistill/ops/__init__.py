"""Fused ops: each one differentiable, each with several backends and one reference.

from fastdistill.ops import group_norm_silu, explain
y = group_norm_silu(x, 32, weight, bias)
print(explain("group_norm_silu", x, 32, weight, bias))
"""

from fastdistill.ops import adamw as _adamw  # noqa: F401  (registers it: `fastdistill.optim` is its user)
from fastdistill.ops._dispatch import BackendError, Explanation, explain
from fastdistill.ops.attention import attention
from fastdistill.ops.geglu import geglu
from fastdistill.ops.gradient_norm import gradient_norm
from fastdistill.ops.group_norm_silu import group_norm_silu
from fastdistill.ops.layer_norm import layer_norm

__all__ = [
    "BackendError",
    "Explanation",
    "attention",
    "explain",
    "geglu",
    "gradient_norm",
    "group_norm_silu",
    "layer_norm",
]
