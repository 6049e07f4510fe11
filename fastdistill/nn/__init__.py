"""Drop-in modules over the fused ops."""

from fastdistill.nn.group_norm_silu import GroupNormSiLU
from fastdistill.nn.layer_norm import LayerNorm

__all__ = ["GroupNormSiLU", "LayerNorm"]
