"""Distillation losses for any training loop."""

from .adversarial import (
    DiscriminatorStats,
    LogitStats,
    hinge_discriminator_loss,
    hinge_generator_loss,
    softplus_discriminator_loss,
    softplus_generator_loss,
)
from .dmd import DMDStats, dmd_gradient, dmd_loss
from .frozen import frozen_state
from .r1 import HingeR1Stats, LazyR1, hinge_r1_loss, r1_penalty

__all__ = [
    "DMDStats",
    "DiscriminatorStats",
    "HingeR1Stats",
    "LazyR1",
    "LogitStats",
    "dmd_gradient",
    "dmd_loss",
    "frozen_state",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "hinge_r1_loss",
    "r1_penalty",
    "softplus_discriminator_loss",
    "softplus_generator_loss",
]
