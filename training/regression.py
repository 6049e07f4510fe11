"""The regression term: how far the student's one step is from where the teacher's ODE carries the same noise."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.diffusion import Schedule
from fastdistill.losses import LPIPS

from .condition import Condition
from .config import TrainerConfig, require
from .economy import size_of
from .image_distance import Distance, ImageDistance
from .memory_config import settled
from .method import Losses, Method, Step, Turn
from .networks import conversion_point, predict_data
from .pairs import Pairs, pairs_for
from .recipe import Setup
from .teacher import Teacher

REGRESSIONS = ("l2", "pixel_l2", "lpips")


class RegressionConfig(Protocol):
    """The fields of a configuration that has a regression term, and pairs for it."""

    trainer: TrainerConfig
    regression: str
    lpips_backbone: str | None
    lpips_heads: str | None
    pairs: int
    pair_steps: int
    pair_solver: str
    guidance_scale: float


def regression_distance(config: RegressionConfig, teacher: Teacher) -> Distance:
    """A function of samples and their targets, each (B, ...), that gives a scalar; no gradient reaches the targets.

    "l2" is the mean squared error of the samples as they are (latents), "pixel_l2" that of the images that the teacher
    decodes them to, "lpips" the perceptual distance of these images (arXiv 1801.03924), which is DMD's.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: files that LPIPS cannot use.
    """
    if config.regression == "l2":
        return F.mse_loss
    by_sample = settled(config.trainer, size_of(teacher.unet)).memory.decode != "plain"
    networks = {"decoder": teacher.pipeline.vae}
    if config.regression == "pixel_l2":
        return ImageDistance(teacher.decode, F.mse_loss, networks, by_sample)
    # VGG's activations at 512 px are larger than the UNet's: those of a whole batch are computed again.
    lpips = LPIPS(config.lpips_backbone, config.lpips_heads, no_grad="y", checkpoint=not by_sample).to(teacher.device)
    return ImageDistance(teacher.decode, lpips, networks | {"lpips": lpips}, by_sample)


def regression_pairs(config: RegressionConfig, setup: Setup) -> Pairs:
    """What the term learns from: the pairs that the run was given, else those that the configuration asks for."""
    return pairs_for(
        setup,
        count=config.pairs,
        steps=config.pair_steps,
        solver=config.pair_solver,
        guidance_scale=config.guidance_scale,
        seed=config.trainer.seed + 1,  # the loop's own noises are drawn from its seed
    )


def check_regression(config: RegressionConfig) -> None:
    """Raise a ValueError for an unknown kind, or for LPIPS without its backbone."""
    known = ", ".join(REGRESSIONS)
    require("regression", config.regression, config.regression in REGRESSIONS, f"one of {known}")
    if config.regression == "lpips" and config.lpips_backbone is None:
        raise ValueError('regression "lpips" needs lpips_backbone, "vgg16" or the path of its weights; got None')


class Regression(Method):
    """The regression term alone: a student that imitates the ODE in one step, and starts DMD2's distillation.

    Each batch has a `pair_noise`, its `pair_sample` and its `pair_condition`.

    Args:
        student: trained here, in place.
        schedule, prediction_type: the teacher's.
        start: the timestep at which the student is called, its input being unit noise.
        distance: see `regression_distance`; what it calls its `networks` are roles too.
    """

    name = "regression"

    def __init__(
        self, student: nn.Module, schedule: Schedule, prediction_type: str, start: int, distance: Distance = F.mse_loss
    ) -> None:
        self.roles = {"student": student.train().requires_grad_(True), **getattr(distance, "networks", {})}
        self.turns = (Turn("student"),)
        self.prediction_type = prediction_type
        self.start = start
        schedule = schedule.to(next(student.parameters()).device)
        self.start_point = conversion_point(schedule, start, prediction_type)
        self.distance = distance
        self.decodes_by_sample = getattr(distance, "by_sample", False)

    def losses(self, role: str, step: Step) -> Losses:
        batch = step.batch
        x = self.generate(batch["pair_noise"], batch["pair_condition"])
        return Losses({"regression": self.distance(x, batch["pair_sample"])})

    def facts(self) -> dict:
        return {"prediction_type": self.prediction_type, "student_timestep": self.start}

    def generate(self, noise: Tensor, condition: Condition) -> Tensor:
        """The student's one step: noise (B, ...) and its condition to a sample of the data (B, ...)."""
        return predict_data(self.roles["student"], noise, self.start, condition, self.start_point, self.prediction_type)
