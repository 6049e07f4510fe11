"""Distillation losses for any training loop."""

from .add import add_distillation_loss
from .denoising import denoising_loss
from .dmd import DMDStats, dmd_gradient, dmd_loss
from .flow import flow_interpolate, flow_matching_loss, straightness
from .nfsd import nfsd_loss

__all__ = [
    "DMDStats",
    "add_distillation_loss",
    "denoising_loss",
    "dmd_gradient",
    "dmd_loss",
    "flow_interpolate",
    "flow_matching_loss",
    "nfsd_loss",
    "straightness",
]
