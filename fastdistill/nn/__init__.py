"""Drop-in modules over the fused ops, and `patch`, which puts them into a diffusers model."""

from fastdistill.nn.attention import FusedAttnProcessor
from fastdistill.nn.geglu import GEGLU
from fastdistill.nn.group_norm_silu import GroupNormSiLU
from fastdistill.nn.joint import join_projections
from fastdistill.nn.layer_norm import LayerNorm
from fastdistill.nn.patch import PatchReport, patch, unpatch

__all__ = [
    "GEGLU",
    "FusedAttnProcessor",
    "GroupNormSiLU",
    "LayerNorm",
    "PatchReport",
    "join_projections",
    "patch",
    "unpatch",
]
