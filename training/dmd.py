"""Distribution matching distillation: a one-step student from a diffusion teacher, without any training images.

Yin et al., arXiv 2311.18828 (DMD); the critic ratio and its reasons arXiv 2405.14867 (DMD2). Three networks of one
architecture: the frozen teacher knows the real distribution, the fake score follows the student's, and the student
moves along the difference of the two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.diffusion import Schedule
from fastdistill.losses import DMDStats, denoising_loss, dmd_loss

from .condition import Condition
from .config import RoleConfig, TrainerConfig, require, role_configs
from .contract import nudged
from .data import PromptData
from .draws import Draws
from .method import Losses, Method, Step, Turn
from .networks import conversion_point, predict, predict_data, predict_guided
from .recipe import Setup, Stage
from .regression import Distance, check_regression, regression_distance, regression_pairs
from .solvers import check_solver


@dataclass(frozen=True)
class DMDConfig:
    """Everything a run depends on beside its teacher and its prompts.

    Attributes:
        trainer: of the loop; its `updates` are the student's.
        student, fake_score: of their optimisers. No momentum by default: the gradient chases a moving target.
        critic_ratio: fake-score updates per student update (TTUR). A fake score that lags behind describes where the
            student was: a trial at ratio 1 with guidance 1.5, on 8x8 pixels, collapsed.
        student_timestep: where the one step starts, with unit noise as input; None is the schedule's last.
        guidance_scale: classifier-free guidance of the teacher, 1 for none. The fake score is never guided.
        min_timestep, max_timestep: range of the timesteps at which the distributions are compared, as shares of T.
        regression_weight: of the distance to the ends of the teacher's ODE, 0 to leave it out.
        regression: that distance: "l2" of latents, "pixel_l2" of decoded images, or "lpips" of these, as in the paper.
        lpips_backbone, lpips_heads: for "lpips": "vgg16" or the path of its weights, and the path of the linear heads.
        pairs, pair_steps, pair_solver: how many noises the ODE is solved for, in how many steps, and by what ("euler",
            "heun" or "dpmpp"); not of pairs that the run is given.
    """

    method: ClassVar[str] = "dmd"

    trainer: TrainerConfig = TrainerConfig(updates=300, batch_size=64, ema_decay=0.98, checkpoint_every=50)
    student: RoleConfig = RoleConfig(2e-4, beta1=0.0, warm_up=20, decay=0.5)
    fake_score: RoleConfig = RoleConfig(4e-4, beta1=0.0, warm_up=20, decay=0.5)
    critic_ratio: int = 3
    student_timestep: int | None = None
    guidance_scale: float = 1.0
    min_timestep: float = 0.02
    max_timestep: float = 0.98
    regression_weight: float = 0.5
    regression: str = "l2"
    lpips_backbone: str | None = None
    lpips_heads: str | None = None
    pairs: int = 2000
    pair_steps: int = 25
    pair_solver: str = "euler"

    def __post_init__(self) -> None:
        for name in ("critic_ratio", "pair_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("guidance_scale", "regression_weight", "pairs"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        require("min_timestep", self.min_timestep, 0 <= self.min_timestep < self.max_timestep, "in [0, max_timestep)")
        require("max_timestep", self.max_timestep, self.max_timestep < 1, "below 1")
        if self.regression_weight > 0 and self.pairs == 0:
            raise ValueError("regression_weight above 0 needs pairs; got pairs = 0")
        check_regression(self)
        check_solver(self.pair_solver)

    def stages(self, setup: Setup) -> Generator[Stage, nn.Module, None]:
        """One: the student from unit noise, its fake score beside it, and pairs for the regression term."""
        teacher = setup.teacher
        unconditional = teacher.unconditional if self.guidance_scale != 1 else None
        method = DMD(
            teacher.unet,
            teacher.schedule,
            teacher.prediction_type,
            self,
            unconditional,
            distance=regression_distance(self, teacher) if self.regression_weight > 0 else F.mse_loss,
        )
        pairs = None
        if self.regression_weight > 0:
            pairs = regression_pairs(self, setup)
        data = PromptData(setup.conditions, teacher.sample_shape, pairs)
        yield Stage("dmd", method, data, self.trainer, role_configs(self))


class DMD(Method):
    """The three roles, and what each one's turn computes.

    Networks are called as diffusers' UNets: `network(x_t, t, encoder_hidden_states=condition, return_dict=False)[0]`.

    Each batch is a `noise` with its `condition`, and for the regression term a `pair_noise`, its `pair_sample` and its
    `pair_condition` (`fastdistill.training.Data`).

    Args:
        teacher: frozen here; student and fake score start as copies of it.
        schedule, prediction_type: the teacher's, and with it everybody's.
        config: see `DMDConfig`.
        unconditional: of the empty prompt; needed for guidance.
        student, fake_score: to start from instead, and to train in place; copies of the teacher by default.
        distance: of the regression term, see `regression_distance`; what it calls its `networks` are roles too.
    """

    name = "dmd"

    def __init__(
        self,
        teacher: nn.Module,
        schedule: Schedule,
        prediction_type: str,
        config: DMDConfig,
        unconditional: Condition | None = None,
        *,
        student: nn.Module | None = None,
        fake_score: nn.Module | None = None,
        distance: Distance = F.mse_loss,
    ):
        last = len(schedule) - 1
        start = last if config.student_timestep is None else config.student_timestep
        require("student_timestep", start, 0 <= start <= last, f"in 0..{last}")
        if config.guidance_scale != 1 and unconditional is None:
            raise ValueError(f"guidance_scale {config.guidance_scale} needs the condition of the empty prompt")
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = (copy.deepcopy(teacher) if student is None else student).train().requires_grad_(True)
        self.fake_score = (copy.deepcopy(teacher) if fake_score is None else fake_score).train().requires_grad_(True)
        self.roles = {"student": self.student, "teacher": self.teacher, "fake_score": self.fake_score}
        self.roles |= getattr(distance, "networks", {})
        # The fake score learns on every batch; every `critic_ratio`-th is the student's too.
        self.turns = (Turn("student", config.critic_ratio), Turn("fake_score"))
        self.schedule = schedule.to(next(self.student.parameters()).device)
        self.prediction_type = diffusion.check_prediction_type(prediction_type)
        self.config = config
        self.unconditional = unconditional
        self.start = start
        self.start_point = conversion_point(self.schedule, start, self.prediction_type)
        self.distance = distance
        self.decodes_by_sample = getattr(distance, "by_sample", False)

    def losses(self, role: str, step: Step) -> Losses:
        return self._student_losses(step) if role == "student" else self._fake_score_losses(step)

    def probing(self) -> AbstractContextManager:
        return nudged(self.fake_score)  # it starts as the teacher's copy, and equal scores give a gradient of zero

    def facts(self) -> dict[str, Any]:
        return {"prediction_type": self.prediction_type, "student_timestep": self.start}

    def generate(self, noise: Tensor, condition: Condition) -> Tensor:
        """The student's one step: noise (B, ...) and its condition to a sample of the data (B, ...)."""
        return predict_data(self.student, noise, self.start, condition, self.start_point, self.prediction_type)

    def _student_losses(self, step: Step) -> Losses:
        x = self.generate(step.batch["noise"], step.batch["condition"])
        step.memo["x"] = x.detach()
        loss, stats = self.distribution_loss(x, step.batch["condition"], step.draws)
        return Losses({"dmd": loss}, {"guarded": stats.guarded / x.numel()}, self._then_regression(step))

    def _then_regression(self, step: Step) -> Callable[[], Losses] | None:
        """It has a pass of the student of its own, and so a graph."""
        weight = self.config.regression_weight
        if weight == 0:
            return None
        return lambda: Losses({"regression": weight * self.regression_loss(step.batch)})

    def regression_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The student's distance to where the teacher's ODE carries the same noise."""
        if "pair_noise" not in batch:
            raise ValueError(f"regression_weight {self.config.regression_weight} needs pairs; the data has none")
        return self.distance(self.generate(batch["pair_noise"], batch["pair_condition"]), batch["pair_sample"])

    def distribution_loss(self, x: Tensor, condition: Condition, draws: Draws) -> tuple[Tensor, DMDStats]:
        """The student's loss on its samples x (B, ...): everything but x is without gradient."""
        lowest = int(self.config.min_timestep * len(self.schedule))
        highest = int(self.config.max_timestep * len(self.schedule))
        with torch.no_grad():
            x_t, t, alpha, sigma, _ = self._diffuse(x, lowest, highest + 1, draws)
            pred_real = predict_guided(
                self.teacher,
                x_t,
                t,
                condition,
                self.config.guidance_scale,
                self.unconditional,
                batched=self.config.trainer.memory.guidance == "batched",
            )
            pred_fake = predict(self.fake_score, x_t, t, condition)
        return dmd_loss(
            x, x_t, pred_real, pred_fake, alpha, sigma, prediction_type=self.prediction_type, return_stats=True
        )

    def _fake_score_losses(self, step: Step) -> Losses:
        """The teacher's own denoising loss, on the student's samples, at all timesteps, without guidance."""
        condition = step.batch["condition"]
        if "x" not in step.memo:
            with torch.no_grad():
                step.memo["x"] = self.generate(step.batch["noise"], condition)
        x = step.memo["x"]
        x_t, t, alpha, sigma, noise = self._diffuse(x, 0, len(self.schedule), step.draws)
        pred = predict(self.fake_score, x_t, t, condition)
        loss = denoising_loss(pred, x, noise, alpha, sigma, prediction_type=self.prediction_type)
        return Losses({"fake_score": loss})

    def _diffuse(self, x: Tensor, low: int, high: int, draws: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        t = draws.randint(low, high)
        noise = draws.randn(*x.shape[1:]).to(x)
        alpha, sigma = self.schedule.at(t)
        return diffusion.add_noise(x, noise, alpha, sigma), t, alpha, sigma, noise
