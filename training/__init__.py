"""Distillation of diffusion teachers into one-step students."""

from .add import ADD, ADDConfig
from .checkpoint import CheckpointError
from .condition import Condition
from .config import RoleConfig, TrainerConfig
from .contract import GradientContractError, check_gradient_contract
from .data import Data, LatentData, PromptData, PromptDropout
from .digits import digits_images
from .discriminator import Discriminator
from .distill import Distilled, distill
from .dmd import DMD, DMDConfig
from .dmd2 import DMD2, DMD2Config
from .draws import Draws
from .fake_score import FakeScore
from .features import FeatureNetwork, Features, build_features
from .flow import Reflow, ReflowConfig
from .images import ImagesConfig, open_images
from .instaflow import FlowDistillation, InstaFlowConfig
from .memory_plan import MemoryPlan
from .method import Losses, Method, Step, Turn
from .pairs import Pairs, PairSetError, load_pairs, make_pairs, pairs_for
from .pipelines import TeacherError
from .planning import plan_memory
from .progress import Run, TrainingProgress
from .recipe import MethodConfig, Setup, Stage
from .straight_path import StraightPath, flow_straightness
from .teacher import Teacher
from .trainer import Diverged, Trainer
from .validation import ValidationConfig, Validator
from .world import World, world_of_environment

__all__ = [
    "ADD",
    "DMD",
    "DMD2",
    "ADDConfig",
    "CheckpointError",
    "Condition",
    "DMD2Config",
    "DMDConfig",
    "Data",
    "Discriminator",
    "Distilled",
    "Diverged",
    "Draws",
    "FakeScore",
    "FeatureNetwork",
    "Features",
    "FlowDistillation",
    "GradientContractError",
    "ImagesConfig",
    "InstaFlowConfig",
    "LatentData",
    "Losses",
    "MemoryPlan",
    "Method",
    "MethodConfig",
    "PairSetError",
    "Pairs",
    "PromptData",
    "PromptDropout",
    "Reflow",
    "ReflowConfig",
    "RoleConfig",
    "Run",
    "Setup",
    "Stage",
    "Step",
    "StraightPath",
    "Teacher",
    "TeacherError",
    "Trainer",
    "TrainerConfig",
    "TrainingProgress",
    "Turn",
    "ValidationConfig",
    "Validator",
    "World",
    "build_features",
    "check_gradient_contract",
    "digits_images",
    "distill",
    "flow_straightness",
    "load_pairs",
    "make_pairs",
    "open_images",
    "pairs_for",
    "plan_memory",
    "world_of_environment",
]
