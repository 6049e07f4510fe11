"""Adversarial diffusion distillation: a student of one to four steps, judged in the features of a frozen network.

Sauer et al., "Adversarial Diffusion Distillation", arXiv 2311.17042. The student denoises real images; a discriminator
tells what it makes of them from the images themselves, and a frozen teacher says where it would have denoised to. No
training code was published: what the paper leaves open is said at the setting that decides it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.diffusion import Schedule
from fastdistill.losses import LazyR1, add_distillation_loss, hinge_generator_loss, hinge_r1_loss, nfsd_loss

from .add_config import ADDConfig
from .augment import augment
from .condition import Condition
from .discriminator import Discriminator
from .draws import Draws
from .method import Losses, Method, Step, Turn
from .networks import conversion_point, predict
from .target import Target
from .unet_features import UNetFeatures


class ADD(Method):
    """The roles, and what each one's turn computes.

    Each batch holds `data`, real samples with their `condition`, and the `noise` of the student's input; `image`, where
    it is there, is what the discriminator sees as real, else the decoded `data` (`fastdistill.training.Data`).

    Args:
        student: called as a diffusers UNet; trains.
        target: the frozen teacher, on its own schedule.
        features: a `FeatureNetwork` or any module like it (`widths`, `width`, and pixels to `Features`), for the latent
            variant a `UNetFeatures`; None without an adversarial loss.
        schedule, prediction_type: the student's. The schedule's last timestep becomes pure noise.
        config: see `ADDConfig`.
        decode: the student's samples (B, ...) to pixels, differentiable; None where a sample has no other form.
        text_width: of the pooled text embedding, where the discriminator is conditioned on it.
    """

    name = "add"

    def __init__(
        self,
        student: nn.Module,
        target: Target,
        features: nn.Module | None,
        schedule: Schedule,
        prediction_type: str,
        config: ADDConfig,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        text_width: int = 0,
    ) -> None:
        self.config = config
        self.student = student.train().requires_grad_(True)
        self.target, self.features = target, features
        self.prediction_type = diffusion.check_prediction_type(prediction_type)
        schedule = schedule.to(next(student.parameters()).device)
        self.schedule = schedule if schedule.alpha[-1] == 0 else schedule.with_pure_noise_end()
        self.timesteps = _checked_timesteps(config.timesteps, len(schedule))
        self.start = max(self.timesteps)
        self.decode = decode or (lambda x: x)
        self.roles = {"student": self.student, "teacher": target.network}
        self.turns = (Turn("student", config.student_every),)
        if config.adversarial_weight > 0:
            self._add_discriminator(text_width)

    def _add_discriminator(self, text_width: int) -> None:
        config = self.config
        if self.features is None:
            raise ValueError(f"adversarial_weight {config.adversarial_weight} needs features; got none")
        latent = isinstance(self.features, UNetFeatures)
        if config.image_condition and latent:
            raise ValueError("image_condition needs a vision network as features; a UNet has no embedding of an image")
        if config.text_condition and text_width == 0:
            raise ValueError("text_condition needs a pooled text embedding, which this teacher's text encoder lacks")
        width = text_width * config.text_condition
        width += self.features.width if config.image_condition else 0
        with torch.random.fork_rng():
            torch.manual_seed(config.trainer.seed)
            self.discriminator = Discriminator(self.features.widths, width)
        self.discriminator.to(next(self.student.parameters()).device)
        self.features.requires_grad_(False)
        self.roles |= {"features": self.features, "discriminator": self.discriminator}
        self.turns += (Turn("discriminator", config.discriminator_every),)
        if config.r1_mode == "lazy" and config.r1_weight > 0:
            self.turns += (Turn("discriminator", config.discriminator_every * config.r1_interval, losses="r1"),)

    def losses(self, role: str, step: Step) -> Losses:
        """Of the role's turn; "r1" is the penalty's own turn in the lazy mode."""
        of_turn = {"student": self._student_losses, "discriminator": self._discriminator_losses, "r1": self._lazy_r1}
        return of_turn[role](step)

    def facts(self) -> dict[str, Any]:
        return {"prediction_type": self.prediction_type, "student_timesteps": list(self.timesteps)}

    def generate(self, data: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The student's one step: data (B, ...) noised to the timesteps t (B,), denoised (B, ...).

        Where t is the last timestep the input is the noise alone.
        """
        x_t = diffusion.add_noise(data, noise, *self.schedule.at(t))
        pred = predict(self.student, x_t, t, condition)
        return diffusion.to_data(
            pred, x_t, *conversion_point(self.schedule, t, self.prediction_type), self.prediction_type
        )
