"""Distillation of diffusion teachers into one-step students."""

from .checkpoint import CheckpointError
from .config import RoleConfig, TrainerConfig
from .contract import GradientContractError, check_gradient_contract
from .data import PromptData
from .distill import Distilled, distill
from .dmd import DMD, DMDConfig
from .draws import Draws
from .method import Losses, Method, Step, Turn
from .pairs import Pairs, make_pairs
from .pipelines import TeacherError
from .trainer import Diverged, Run, Trainer, TrainingProgress

__all__ = [
    "DMD",
    "CheckpointError",
    "DMDConfig",
    "Distilled",
    "Diverged",
    "Draws",
    "GradientContractError",
    "Losses",
    "Method",
    "Pairs",
    "PromptData",
    "RoleConfig",
    "Run",
    "Step",
    "TeacherError",
    "Trainer",
    "TrainerConfig",
    "TrainingProgress",
    "Turn",
    "check_gradient_contract",
    "distill",
    "make_pairs",
]
