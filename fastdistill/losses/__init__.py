"""Distillation losses for any training loop."""

from fastdistill.ops.lpips_distance import lpips_distance

from .add import add_distillation_loss
from .adversarial import (
    DiscriminatorStats,
    LogitStats,
    hinge_discriminator_loss,
    hinge_generator_loss,
    softplus_discriminator_loss,
    softplus_generator_loss,
)
from .denoising import denoising_loss
from .dmd import DMDStats, dmd_gradient, dmd_loss
from .flow import flow_interpolate, flow_matching_loss, straightness
from .frozen import frozen_state
from .lpips import LPIPS
from .nfsd import nfsd_loss
from .r1 import HingeR1Stats, LazyR1, hinge_r1_loss, r1_penalty

__all__ = [
    "LPIPS",
    "DMDStats",
    "DiscriminatorStats",
    "HingeR1Stats",
    "LazyR1",
    "LogitStats",
    "add_distillation_loss",
    "denoising_loss",
    "dmd_gradient",
    "dmd_loss",
    "flow_interpolate",
    "flow_matching_loss",
    "frozen_state",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "hinge_r1_loss",
    "lpips_distance",
    "nfsd_loss",
    "r1_penalty",
    "softplus_discriminator_loss",
    "softplus_generator_loss",
    "straightness",
]
