"""Fused ops: each one differentiable, each with several backends and one reference.

from fastdistill.ops import group_norm_silu, explain
y = group_norm_silu(x, 32, weight, bias)
print(explain("group_norm_silu", x, 32, weight, bias))
"""

from fastdistill.ops import adamw as _adamw  # noqa: F401  (registers it: `fastdistill.optim` is its user)
from fastdistill.ops._dispatch import BackendError, Explanation, explain
from fastdistill.ops.adversarial_loss import adversarial_loss
from fastdistill.ops.attention import attention
from fastdistill.ops.dmd_gradient import dmd_gradient
from fastdistill.ops.geglu import geglu
from fastdistill.ops.gradient_norm import gradient_norm
from fastdistill.ops.group_norm_silu import group_norm_silu
from fastdistill.ops.layer_norm import layer_norm
from fastdistill.ops.lpips_distance import lpips_distance
from fastdistill.ops.squared_norm import squared_norm
from fastdistill.ops.weighted_squared_error import weighted_squared_error

__all__ = [
    "BackendError",
    "Explanation",
    "adversarial_loss",
    "attention",
    "dmd_gradient",
    "explain",
    "geglu",
    "gradient_norm",
    "group_norm_silu",
    "layer_norm",
    "lpips_distance",
    "squared_norm",
    "weighted_squared_error",
]
