"""Improved distribution matching distillation (DMD2): real data through a GAN, students of one or several steps.

Yin et al., arXiv 2405.14867. To DMD's distribution loss comes a discriminator on the fake score's own middle, which
learns from real samples what the teacher does not know; the regression to the teacher's ODE goes, and a fake score
that is updated more often than the student keeps the two stable without it. A student of several steps trains on what
it makes of its own earlier steps (backward simulation), as it will be sampled.
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.diffusion import Schedule
from fastdistill.losses import denoising_loss, softplus_generator_loss

from .condition import Condition
from .config import RoleConfig, TrainerConfig, require, role_configs
from .data import Data, PromptData, networks_of
from .dmd import DMD
from .draws import Draws
from .fake_score import FakeScore, mid_block_head
from .method import Losses, Step
from .networks import conversion_point, predict, predict_data
from .pipelines import renoising_scheduler
from .recipe import Setup, Stage
from .regression import (
    Distance,
    Regression,
    check_regression,
    regression_distance,
    regression_pairs,
)
from .solvers import check_solver


@dataclass(frozen=True)
class DMD2Config:
    """Everything a run depends on beside its teacher, its prompts and its real samples.

    Attributes:
        trainer: of the loop; its `updates` are the student's.
        student, fake_score: of their optimisers; the fake score's moves its head too.
        critic_ratio: fake-score updates per student update (TTUR).
        student_steps: the timesteps that the student visits, descending; its first input is unit noise.
        guidance_scale: classifier-free guidance of the teacher, 1 for none. The fake score is never guided.
        min_timestep, max_timestep: range of the timesteps at which the distributions are compared, as shares of T.
        distribution_weight: of the distribution loss. At 0 the GAN trains the student alone, and the fake score is no
            more than its discriminator.
        gan_weight: of the student's GAN term. At 0 there is no discriminator, and no real samples are needed.
        critic_gan_weight: of the discriminator's term beside the fake score's denoising loss.
        regression_weight: of the distance to the ends of the teacher's ODE, as in DMD; the paper leaves it out.
        warm_up_updates: of a stage before, in which the student learns these ends alone, in one step from its first
            timestep. Students that start elsewhere than at the last timestep, where no teacher knows unit noise, need
            it.
        regression, lpips_backbone, lpips_heads, pairs, pair_steps, pair_solver: of both, as in `DMDConfig`.
    """

    method: ClassVar[str] = "dmd2"

    trainer: TrainerConfig = TrainerConfig(updates=200, batch_size=32, ema_decay=0.98, checkpoint_every=50)
    student: RoleConfig = RoleConfig(2e-4, beta1=0.0, warm_up=20, decay=0.5)
    fake_score: RoleConfig = RoleConfig(4e-4, beta1=0.0, warm_up=20, decay=0.5)
    critic_ratio: int = 3
    student_steps: tuple[int, ...] = (999,)
    guidance_scale: float = 1.0
    min_timestep: float = 0.02
    max_timestep: float = 0.98
    distribution_weight: float = 1.0
    gan_weight: float = 3e-3
    critic_gan_weight: float = 1e-2
    regression_weight: float = 0.0
    warm_up_updates: int = 0
    regression: str = "l2"
    lpips_backbone: str | None = None
    lpips_heads: str | None = None
    pairs: int = 2000
    pair_steps: int = 25
    pair_solver: str = "euler"

    def __post_init__(self) -> None:
        for name in ("critic_ratio", "pair_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in (
            "guidance_scale",
            "distribution_weight",
            "gan_weight",
            "critic_gan_weight",
            "regression_weight",
            "warm_up_updates",
            "pairs",
        ):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        require("min_timestep", self.min_timestep, 0 <= self.min_timestep < self.max_timestep, "in [0, max_timestep)")
        require("max_timestep", self.max_timestep, self.max_timestep < 1, "below 1")
        descending = all(a > b for a, b in zip(self.student_steps, self.student_steps[1:]))
        holds = len(self.student_steps) > 0 and descending and self.student_steps[-1] >= 1
        require("student_steps", self.student_steps, holds, "one or more timesteps, descending, the last at least 1")
        if self.distribution_weight == 0 and self.gan_weight == 0:
            raise ValueError("distribution_weight and gan_weight are both 0: nothing would train the student")
        if self.gan_weight > 0 and self.critic_gan_weight == 0:
            raise ValueError("gan_weight above 0 needs critic_gan_weight above 0: a discriminator that learns; got 0")
        if self.needs_pairs and self.pairs == 0:
            raise ValueError("warm_up_updates and regression_weight above 0 need pairs; got pairs = 0")
        check_regression(self)
        check_solver(self.pair_solver)

    @property
    def student_timestep(self) -> int:
        """Where the first step starts."""
        return self.student_steps[0]

    @property
    def needs_pairs(self) -> bool:
        return self.warm_up_updates > 0 or self.regression_weight > 0

    def stages(self, setup: Setup) -> Generator[Stage, nn.Module, None]:
        """The warm-up, where there is one, and the distillation."""
        teacher = setup.teacher
        if len(self.student_steps) > 1:
            renoising_scheduler(teacher.pipeline.scheduler, self.student_steps)  # raises before the training, not after
        unconditional = teacher.unconditional if self.guidance_scale != 1 else None
        data = setup.needed_images(self.method) if self.gan_weight > 0 else None
        distance = regression_distance(self, teacher) if self.needs_pairs else F.mse_loss
        student, fake_score = copy.deepcopy(teacher.unet), copy.deepcopy(teacher.unet)
        if self.gan_weight > 0:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.trainer.seed)
                fake_score = FakeScore(fake_score, mid_block_head(teacher.unet).to(teacher.device))
        pairs = None
        if self.needs_pairs:
            pairs = regression_pairs(self, setup)
        paired = PromptData(setup.conditions, teacher.sample_shape, pairs)
        if self.warm_up_updates > 0:
            warm_up = Regression(student, teacher.schedule, teacher.prediction_type, self.student_timestep, distance)
            trainer = replace(self.trainer, updates=self.warm_up_updates)
            student = yield Stage("dmd2-warm-up", warm_up, paired, trainer, {"student": self.student}, is_last=False)
            del warm_up  # its student, of which the average goes on
        method = DMD2(
            teacher.unet,
            teacher.schedule,
            teacher.prediction_type,
            self,
            unconditional,
            student=student,
            fake_score=fake_score,
            distance=distance if self.regression_weight > 0 else F.mse_loss,
        )
        if data is None:
            data = paired
        elif self.regression_weight > 0:
            data = Together(paired, data)
        yield Stage("dmd2", method, data, self.trainer, role_configs(self))


class DMD2(DMD):
    """DMD's roles; the fake score has a head, and the student one or several steps.

    Each batch is a `noise` with its `condition`, and for the GAN a real sample `data` of the same condition.

    Args:
        config: see `DMD2Config`.
        fake_score: a `FakeScore` where the GAN has a weight.
        The others are DMD's.
    """

    name = "dmd2"

    def __init__(
        self,
        teacher: nn.Module,
        schedule: Schedule,
        prediction_type: str,
        config: DMD2Config,
        unconditional: Condition | None = None,
        *,
        student: nn.Module | None = None,
        fake_score: nn.Module | None = None,
        distance: Distance = F.mse_loss,
    ) -> None:
        if config.gan_weight > 0 and not isinstance(fake_score, FakeScore):
            raise ValueError(
                f"gan_weight {config.gan_weight} needs a FakeScore, a score network with a head; "
                f"got {type(fake_score).__name__}"
            )
        require(
            "student_steps", config.student_steps, config.student_steps[0] < len(schedule), f"below {len(schedule)}"
        )
        super().__init__(
            teacher,
            schedule,
            prediction_type,
            config,
            unconditional,
            student=student,
            fake_score=fake_score,
            distance=distance,
        )
        self.steps = tuple(config.student_steps)
        self.levels = [self.schedule.at(t) for t in self.steps]
        self.points = [conversion_point(self.schedule, t, self.prediction_type) for t in self.steps]

    def facts(self) -> dict[str, Any]:
        return {"prediction_type": self.prediction_type, "student_steps": list(self.steps)}

    def sampling(self) -> dict[str, Any]:
        several = {"timesteps": list(self.steps)} if len(self.steps) > 1 else {}
        return super().sampling() | {"steps": len(self.steps)} | several

    def scheduler(self, teacher_scheduler: Any) -> Any:
        if len(self.steps) == 1:
            return super().scheduler(teacher_scheduler)
        return renoising_scheduler(teacher_scheduler, self.steps)

    def generate_in_steps(self, noise: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """All of the student's steps: noise (B, ...) and its condition to a sample of the data (B, ...)."""
        last = len(self.steps) - 1
        return self._step(self.simulate(noise, condition, last, draws), last, condition)

    @torch.no_grad()
    def simulate(self, noise: Tensor, condition: Condition, steps: int, draws: Draws) -> Tensor:
        """Backward simulation: what the student's step number `steps`, counted from 0, gets to see, (B, ...).

        After each step before it the sample is diffused with fresh noise to the next one's timestep.
        """
        x_t = noise
        for index in range(steps):
            x = self._step(x_t, index, condition)
            x_t = diffusion.add_noise(x, draws.randn(*x.shape[1:]).to(x), *self.levels[index + 1])
        return x_t

    def sample(self, step: Step) -> Tensor:
        """Of one of the student's steps, the same for the whole batch, with its gradient."""
        draws = step.draws.fork("steps")
        chosen = draws.shared(0, len(self.steps))
        x_t = self.simulate(step.batch["noise"], step.batch["condition"], chosen, draws)
        return self._step(x_t, chosen, step.batch["condition"])

    def _step(self, x_t: Tensor, index: int, condition: Condition) -> Tensor:
        return predict_data(self.student, x_t, self.steps[index], condition, self.points[index], self.prediction_type)

    def _student_losses(self, step: Step) -> Losses:
        config, condition = self.config, step.batch["condition"]
        x = self.sample(step)
        step.memo["x"] = x.detach()
        terms, logs = {}, {}
        if config.distribution_weight > 0:
            loss, stats = self.distribution_loss(x, condition, step.draws)
            terms["dmd"] = config.distribution_weight * loss
            logs["guarded"] = stats.guarded / x.numel()
        if config.gan_weight > 0:
            x_t, t, *_ = self._diffuse(x, 0, len(self.schedule), step.draws.fork("gan"))
            terms["gan"] = config.gan_weight * softplus_generator_loss(self.fake_score.logits(x_t, t, condition))
        return Losses(terms, logs, self._then_regression(step))

    def _fake_score_losses(self, step: Step) -> Losses:
        """The denoising loss on the student's samples and the discriminator's, by one pass; then that of real ones."""
        config, condition = self.config, step.batch["condition"]
        if "x" not in step.memo:
            with torch.no_grad():
                step.memo["x"] = self.sample(step)
        x = step.memo["x"]
        x_t, t, alpha, sigma, noise = self._diffuse(x, 0, len(self.schedule), step.draws)
        terms, logs = {}, {}
        if config.gan_weight == 0:
            pred = predict(self.fake_score, x_t, t, condition)
        elif config.distribution_weight == 0:
            logits = self.fake_score.logits(x_t, t, condition)
        else:
            pred, logits = self.fake_score.predict_with_logits(x_t, t, condition)
        if config.distribution_weight > 0:
            terms["fake_score"] = denoising_loss(pred, x, noise, alpha, sigma, prediction_type=self.prediction_type)
        if config.gan_weight == 0:
            return Losses(terms)
        loss, stats = softplus_generator_loss(-logits, return_stats=True)
        terms["discriminator_fake"] = config.critic_gan_weight * loss
        logs["fake_right"] = stats.positive
        return Losses(terms, logs, lambda: self._discriminator_real(step))

    def _discriminator_real(self, step: Step) -> Losses:
        """The discriminator's other half: softplus(-logits) of real samples, as softplus(logits) of generated ones."""
        condition = step.batch["condition"]
        x_t, t, *_ = self._diffuse(self._real(step), 0, len(self.schedule), step.draws.fork("real"))
        logits = self.fake_score.logits(x_t, t, condition)
        loss, stats = softplus_generator_loss(logits, return_stats=True)
        return Losses({"discriminator_real": self.config.critic_gan_weight * loss}, {"real_right": stats.positive})

    def _real(self, step: Step) -> Tensor:
        if "data" not in step.batch:
            raise ValueError(f"gan_weight {self.config.gan_weight} needs real samples; the data has none")
        return step.batch["data"]


class Together:
    """Batches with the names of several sources; where two give the same name, the later's."""

    def __init__(self, *sources: Data) -> None:
        self.sources = sources

    def batch(self, first: int, draws: Draws) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for number, source in enumerate(self.sources):
            batch |= source.batch(first, draws.fork(str(number)))
        return batch

    @property
    def networks(self) -> list[nn.Module]:
        """Those of all."""
        return [network for source in self.sources for network in networks_of(source)]
