"""Distillation of diffusion teachers into one-step students."""

from .checkpoint import CheckpointError
from .condition import Condition
from .config import RoleConfig, TrainerConfig
from .contract import GradientContractError, check_gradient_contract
from .data import Data, LatentData, PromptData, PromptDropout
from .digits import digits_images
from .distill import Distilled, distill
from .dmd import DMD, DMDConfig
from .draws import Draws
from .images import ImagesConfig, open_images
from .method import Losses, Method, Step, Turn
from .pairs import Pairs, make_pairs
from .pipelines import TeacherError
from .progress import Run, TrainingProgress
from .recipe import MethodConfig, Setup, Stage
from .teacher import Teacher
from .trainer import Diverged, Trainer
from .world import World, world_of_environment

__all__ = [
    "DMD",
    "CheckpointError",
    "Condition",
    "DMDConfig",
    "Data",
    "Distilled",
    "Diverged",
    "Draws",
    "GradientContractError",
    "ImagesConfig",
    "LatentData",
    "Losses",
    "Method",
    "MethodConfig",
    "Pairs",
    "PromptData",
    "PromptDropout",
    "RoleConfig",
    "Run",
    "Setup",
    "Stage",
    "Step",
    "Teacher",
    "TeacherError",
    "Trainer",
    "TrainerConfig",
    "TrainingProgress",
    "Turn",
    "World",
    "check_gradient_contract",
    "digits_images",
    "distill",
    "make_pairs",
    "open_images",
    "world_of_environment",
]
