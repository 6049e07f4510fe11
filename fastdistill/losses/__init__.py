"""Distillation losses for any training loop."""

from .dmd import DMDStats, dmd_gradient, dmd_loss

__all__ = ["DMDStats", "dmd_gradient", "dmd_loss"]
