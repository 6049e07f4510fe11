"""Distillation losses for any training loop."""

from fastdistill.ops.lpips_distance import lpips_distance

from .add import add_distillation_loss
from .denoising import denoising_loss
from .dmd import DMDStats, dmd_gradient, dmd_loss
from .flow import flow_interpolate, flow_matching_loss, straightness
from .lpips import LPIPS
from .nfsd import nfsd_loss

__all__ = [
    "LPIPS",
    "DMDStats",
    "add_distillation_loss",
    "denoising_loss",
    "dmd_gradient",
    "dmd_loss",
    "flow_interpolate",
    "flow_matching_loss",
    "lpips_distance",
    "nfsd_loss",
    "straightness",
]
