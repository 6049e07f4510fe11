"""Distillation losses for any training loop."""

from fastdistill.ops.lpips_distance import lpips_distance

from .dmd import DMDStats, dmd_gradient, dmd_loss
from .lpips import LPIPS

__all__ = ["LPIPS", "DMDStats", "dmd_gradient", "dmd_loss", "lpips_distance"]
