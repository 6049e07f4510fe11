"""Distillation of diffusion teachers into one-step students."""

from .contract import GradientContractError, check_gradient_contract
from .distill import Distilled, distill
from .dmd import DMD, DMDConfig
from .loop import DMDProgress, DMDRun, train
from .pairs import Pairs, make_pairs
from .pipelines import TeacherError

__all__ = [
    "DMD",
    "DMDConfig",
    "DMDProgress",
    "DMDRun",
    "Distilled",
    "GradientContractError",
    "Pairs",
    "TeacherError",
    "check_gradient_contract",
    "distill",
    "make_pairs",
    "train",
]
