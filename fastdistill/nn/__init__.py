"""Drop-in modules over the fused ops."""

from fastdistill.nn.geglu import GEGLU
from fastdistill.nn.group_norm_silu import GroupNormSiLU

__all__ = ["GEGLU", "GroupNormSiLU"]
