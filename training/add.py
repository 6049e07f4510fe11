"""Adversarial diffusion distillation: a student of one to four steps, judged in the features of a frozen network.

Sauer et al., "Adversarial Diffusion Distillation", arXiv 2311.17042. The student denoises noised real images; a
discriminator tells what it makes of them from the images themselves, and a frozen teacher says where it would have
denoised to. No training code was published: what the paper leaves open is a setting here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.diffusion import Schedule
from fastdistill.losses import LazyR1, add_distillation_loss, hinge_generator_loss, hinge_r1_loss, nfsd_loss
from fastdistill.losses.nfsd import SMALL_NOISE

from .adapters import AdapterRole
from .augment import augment, augmentations
from .condition import Condition
from .config import RoleConfig, TrainerConfig, require, role_configs
from .data import Data, LatentData, networks_of
from .discriminator import Discriminator, groups_of
from .draws import Draws
from .features import build_features
from .method import Losses, Method, Step, Turn
from .networks import conversion_point, predict
from .pipelines import one_step_scheduler, weights_digest
from .recipe import Setup, Stage
from .target import Target
from .teacher import Teacher
from .unet_features import UNET_FEATURES, UNetFeatures

_CHOICES = {
    "student_init": ("teacher", "random"),
    "heads": ("mean", "sum"),
    "r1_mode": ("exact", "lazy", "approximate", "finite_difference"),
    "distill_space": ("pixel", "latent"),
    "weighting": ("exponential", "sds", "nfsd"),
}


@dataclass(frozen=True)
class ADDConfig:
    """Everything a run depends on beside its teacher, its prompts and its images.

    The defaults are what works best of what was tried on the digits. The paper gives no optimiser, batch size, number
    of updates or ratio of turns; where it says something else, it is said here.

    Attributes:
        trainer: of the loop; its `updates` are the student's.
        student, discriminator: of their optimisers.
        student_every, discriminator_every: iterations per update of each (TTUR).
        timesteps: (the paper's: 249, 499, 749, 999) of the student's input, drawn uniformly; one named twice is drawn
            twice as often. At the last of the schedule the input is noise alone. The student starts at the highest.
        student_init: "teacher", its weights, or "random".
        adversarial_weight: of the adversarial term, 0 to leave it out, and the discriminator with it.
        heads: "mean" or "sum" over the discriminator's heads. The paper sums: with the mean of K heads its constants
            correspond to `distill_weight` / K and `r1_weight` as it is.
        features: the network in whose features the discriminator judges: a name for
            `fastdistill.training.build_features`, or "teacher-unet" for the latent variant (arXiv 2403.12015).
        feature_timesteps: of the latent variant, lowest and highest timestep at which the latents are noised.
        text_condition, image_condition: whether the discriminator is told the pooled text embedding, and the features'
            embedding of the image that the student's input was made of.
            (The paper's: both. In one step from noise the student cannot know the image.)
        augmentation: DiffAug's policy on real and generated images, comma-separated; "" for none.
        r1_weight: gamma of R1 at the heads' inputs, `gamma/2 * |gradient|^2`, 0 for none. (The paper's: 2e-5 so.)
        r1_mode: "exact"; "lazy", exact as an optimiser step of its own after every `r1_interval` updates of the
            discriminator; "approximate" or "finite_difference", without second derivatives (`fastdistill.losses`).
        r1_interval: of "lazy".
        r1_sigma: of "approximate", in units of the features.
        distill_weight: (the paper's: 2.5, with heads="sum") lambda of the distillation term, 0 to leave it out.
        distill_space: where the distance to the teacher is taken, "pixel" through the decoder, or "latent".
        weighting: "exponential", c(t) = alpha; "sds"; "nfsd", a gradient of its own, on latents.
        nfsd_scale, negative_prompt: of "nfsd".
        target_teacher: name or folder of another teacher to draw towards; "" for the one the student starts from.
        teacher_steps: denoising steps of the teacher.
        guidance_scale: classifier-free guidance of the teacher, 1 for none.
    """

    method: ClassVar[str] = "add"

    trainer: TrainerConfig = TrainerConfig(updates=300, batch_size=32, ema_decay=0.98, checkpoint_every=50)
    student: RoleConfig = RoleConfig(1e-4, beta1=0.0, beta2=0.99, warm_up=20, decay=0.5)
    discriminator: RoleConfig = RoleConfig(5e-3, beta1=0.5, beta2=0.99, weight_decay=0.0, decay=0.5)
    student_every: int = 2
    discriminator_every: int = 1
    timesteps: tuple[int, ...] = (999,)
    student_init: str = "teacher"
    adversarial_weight: float = 1.0
    heads: str = "mean"
    features: str = "digits-vit"
    feature_timesteps: tuple[int, int] = (20, 980)
    text_condition: bool = True
    image_condition: bool = False
    augmentation: str = ""
    r1_weight: float = 1e-3
    r1_mode: str = "exact"
    r1_interval: int = 16
    r1_sigma: float = 0.01
    distill_weight: float = 1.0
    distill_space: str = "pixel"
    weighting: str = "exponential"
    nfsd_scale: float = 7.5
    negative_prompt: str = "unrealistic, blurry, low quality"
    target_teacher: str = ""
    teacher_steps: int = 1
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            require(name, getattr(self, name), getattr(self, name) in known, f"one of {', '.join(known)}")
        for name in ("student_every", "discriminator_every", "r1_interval", "teacher_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("adversarial_weight", "r1_weight", "distill_weight", "guidance_scale", "nfsd_scale"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        require("r1_sigma", self.r1_sigma, self.r1_sigma > 0, "more than 0")
        require("timesteps", self.timesteps, len(self.timesteps) > 0, "one timestep or more")
        augmentations(self.augmentation)
        if self.adversarial_weight == 0 and self.distill_weight == 0:
            raise ValueError("adversarial_weight and distill_weight are both 0: nothing is left to learn from")
        if self.adversarial_weight > 0:
            groups_of(self.trainer.batch_size)
        if self.weighting == "nfsd" and (self.distill_space != "latent" or self.teacher_steps != 1):
            raise ValueError(
                'weighting "nfsd" is a gradient on latents, of one pass of the teacher: needed distill_space "latent" '
                f'and teacher_steps 1; got "{self.distill_space}" and {self.teacher_steps}'
            )

    def stages(self, setup: Setup) -> Generator[Stage, nn.Module, None]:
        """One: student and discriminator against a frozen teacher, on real images."""
        teacher, data = setup.teacher, setup.needed_images("add")
        target, data = self._target(setup, data)
        pooled = setup.conditions.pooled
        method = ADD(
            copy.deepcopy(teacher.unet) if self.student_init == "teacher" else _random_like(teacher, self.trainer.seed),
            target,
            self._features(teacher, setup.conditions) if self.adversarial_weight > 0 else None,
            teacher.schedule,
            teacher.prediction_type,
            self,
            decode=teacher.decode,
            decoder=teacher.pipeline.vae,
            text_width=0 if pooled is None else pooled.shape[1],
        )
        yield Stage("add", method, data, self.trainer, method.role_configs())

    def _features(self, teacher: Teacher, conditions: Condition) -> nn.Module:
        if self.features != UNET_FEATURES:
            return build_features(self.features).to(teacher.device)
        sample = torch.zeros(1, *teacher.sample_shape, device=teacher.device)
        return UNetFeatures(teacher.unet, teacher.schedule, *self.feature_timesteps, sample, conditions[:1])

    def _target(self, setup: Setup, data: Data) -> tuple[Target, Data]:
        """Whom to draw towards; the data with what it needs to be told, where that is not what the student is told."""
        own, teacher = setup.teacher, setup.teacher
        options: dict[str, Any] = {"decode": own.decode}
        if self.target_teacher:
            teacher = Teacher(self.target_teacher, own.device)
            options["decode"] = teacher.decode
            if weights_digest(teacher.pipeline.vae) != weights_digest(own.pipeline.vae):
                if self.distill_space == "latent":
                    raise ValueError(
                        f"target_teacher {self.target_teacher} has an autoencoder of its own: its latents are not the "
                        'student\'s; needed distill_space "pixel"'
                    )
                options["encode"] = teacher.encode_images
            if weights_digest(teacher.pipeline.text_encoder) != weights_digest(own.pipeline.text_encoder):
                data = _with_conditions(data, setup, teacher)
                options["condition"] = "target_condition"
        if self.guidance_scale != 1 or self.weighting == "nfsd":
            options["unconditional"] = teacher.unconditional
        if self.weighting == "nfsd":
            options["negative"] = teacher.encode([self.negative_prompt])
        target = Target(
            teacher.unet,
            teacher.schedule,
            teacher.prediction_type,
            steps=self.teacher_steps,
            guidance_scale=self.guidance_scale,
            batched_guidance=self.trainer.memory.guidance == "batched",
            **options,
        )
        return target, data


class ADD(Method):
    """The roles, and what each one's turn computes.

    Each batch holds `data`, real samples with their `condition`, and the `noise` of the student's input; `image`, where
    it is there, is what the discriminator sees as real, else the decoded `data` (`fastdistill.training.Data`).

    Args:
        student: called as a diffusers UNet; trains.
        target: the frozen teacher, on its own schedule.
        features: a `FeatureNetwork` or any module like it (`widths`, `width`, pixels to `Features`), or for the latent
            variant a `UNetFeatures`; None without an adversarial term.
        schedule, prediction_type: the student's. The schedule's last timestep becomes pure noise.
        config: see `ADDConfig`.
        decode: the student's samples (B, ...) to pixels, differentiable; None where samples have no other form.
        decoder: the network that `decode` uses.
        text_width: of the pooled text embedding, where the discriminator is told it.
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
        decoder: nn.Module | None = None,
        text_width: int = 0,
    ) -> None:
        device = next(student.parameters()).device
        last = len(schedule) - 1
        for t in config.timesteps:
            require("timesteps", t, 0 <= t <= last, f"in 0..{last}")
        self.config = config
        self.student = student.train().requires_grad_(True)
        self.target, self.features, self.decode = target, features, decode
        self.prediction_type = diffusion.check_prediction_type(prediction_type)
        schedule = schedule.to(device)
        self.schedule = schedule if schedule.alpha[-1] == 0 else schedule.with_pure_noise_end()
        self.timesteps = torch.tensor(config.timesteps, device=device)
        self.start = max(config.timesteps)
        self.roles = {"student": self.student, "teacher": target.network.eval().requires_grad_(False)}
        if decoder is not None and self._needs_pixels:
            self.roles["decoder"] = decoder
        self.turns: tuple[Turn, ...] = (Turn("student", config.student_every),)
        if config.adversarial_weight > 0:
            self._add_discriminator(text_width, device)

    def _add_discriminator(self, text_width: int, device: torch.device) -> None:
        config, features = self.config, self.features
        if features is None:
            raise ValueError(f"adversarial_weight {config.adversarial_weight} needs features; got None")
        if config.image_condition and self.judges_latents:
            raise ValueError(
                "image_condition needs a network with an embedding of whole images; features that are a UNet's have "
                "none: needed image_condition=False"
            )
        if config.text_condition and text_width == 0:
            raise ValueError("text_condition needs a pooled text embedding, and this text encoder has none")
        width = text_width if config.text_condition else 0
        width += features.width if config.image_condition else 0
        with torch.random.fork_rng():
            torch.manual_seed(config.trainer.seed)
            self.discriminator = Discriminator(features.widths, width).to(device)
        self.roles |= {"features": features.eval().requires_grad_(False), "discriminator": self.discriminator}
        self.turns += (Turn("discriminator", config.discriminator_every),)
        if config.r1_mode == "lazy" and config.r1_weight > 0:
            self.turns += (Turn("discriminator", config.discriminator_every * config.r1_interval, asks_for="r1"),)

    @property
    def judges_latents(self) -> bool:
        return isinstance(self.features, UNetFeatures)

    def role_configs(self) -> dict[str, RoleConfig]:
        """Of the roles that train; with a lazy penalty's steps they move and forget as without."""
        configs = {role: config for role, config in role_configs(self.config).items() if role in self.roles}
        if any(turn.asks_for == "r1" for turn in self.turns):
            role = configs["discriminator"]
            lazy = LazyR1(self.config.r1_interval).optimizer_kwargs(role.learning_rate, (role.beta1, role.beta2))
            beta1, beta2 = lazy["betas"]
            configs["discriminator"] = replace(role, learning_rate=lazy["lr"], beta1=beta1, beta2=beta2)
        return configs

    def losses(self, role: str, step: Step) -> Losses:
        """Of a role's turn; "r1" is the discriminator's second one, the lazy penalty's."""
        turns = {"student": self._student_losses, "discriminator": self._discriminator_losses, "r1": self._lazy_penalty}
        return turns[role](step)

    def facts(self) -> dict[str, Any]:
        return {"prediction_type": self.prediction_type, "student_timesteps": list(self.config.timesteps)}

    def scheduler(self, teacher_scheduler: Any) -> Any:
        """One step from the highest timestep, or more by trailing spacing; at the last one the input is noise alone."""
        scheduler = one_step_scheduler(teacher_scheduler, self.start)
        noise_at_the_end = self.start == len(self.schedule) - 1
        if self.prediction_type == "epsilon" or not noise_at_the_end or scheduler.alphas_cumprod[-1] == 0:
            return scheduler
        # The student knows its first input as noise alone; epsilon is read with the teacher's coefficients anyhow.
        betas = [*scheduler.betas[:-1].tolist(), 1.0]
        return type(scheduler).from_config(scheduler.config, trained_betas=betas)

    def generate(self, data: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The student's one step: data (B, ...) noised to timesteps t (B,), and denoised (B, ...)."""
        x_t = diffusion.add_noise(data, noise, *self.schedule.at(t))
        pred = predict(self.student, x_t, t, condition)
        point = conversion_point(self.schedule, t, self.prediction_type)
        return diffusion.to_data(pred, x_t, *point, self.prediction_type)

    def distillation_loss(self, x: Tensor, pixels: Tensor | None, condition: Condition, draws: Draws) -> Tensor:
        """The distance to where the teacher denoises the student's samples x (B, ...), which it sees diffused.

        pixels: of x, decoded; what is compared in pixel space, and encoded again for a target with its own latents.
        condition: as the target understands it.
        """
        config, target = self.config, self.target
        with torch.no_grad():
            seen = x.detach() if target.encode is None else target.encode(pixels.detach())
            t = draws.randint(0, len(target.schedule))
            alpha, sigma = target.schedule.at(t)
            noise = draws.randn(*seen.shape[1:]).to(seen)
            x_t = diffusion.add_noise(seen, noise, alpha, sigma)
            if config.weighting != "nfsd":
                mu = target.denoise(x_t, t, condition)
                if config.distill_space == "pixel" and target.decode is not None:
                    mu = target.decode(mu)
        if config.weighting == "nfsd":
            small = SMALL_NOISE * len(target.schedule) // 1000
            noises = target.noises(x_t, t, condition)
            return nfsd_loss(x, *noises, t, sigma.square(), config.nfsd_scale, small_noise=small)
        compared = pixels if config.distill_space == "pixel" else x
        return add_distillation_loss(compared, mu, alpha, sigma, weighting=config.weighting)

    def _student_losses(self, step: Step) -> Losses:
        config, condition = self.config, step.batch["condition"]
        x, pixels = self._sample(step)
        terms, logs = {}, {}
        if config.adversarial_weight > 0:
            tokens = self._tokens(x, pixels, condition, step.draws.fork("look"))
            step.memo["fake"] = tuple(each.detach() for each in tokens)
            logits = self.discriminator(tokens, self._told(step))
            terms["adversarial"] = config.adversarial_weight * hinge_generator_loss(logits, heads=config.heads)
        if config.distill_weight > 0:
            understood = step.batch[self.target.condition]
            loss = self.distillation_loss(x, pixels, understood, step.draws.fork("distill"))
            terms["distill"] = config.distill_weight * loss
        return Losses(terms, logs)

    def _discriminator_losses(self, step: Step) -> Losses:
        config = self.config
        if "fake" not in step.memo:  # the student had no turn in this iteration
            with torch.no_grad():
                x, pixels = self._sample(step)
                step.memo["fake"] = self._tokens(x, pixels, step.batch["condition"], step.draws.fork("look"))
        lazy = config.r1_mode == "lazy"
        with _seeded(step.draws):
            loss, stats = hinge_r1_loss(
                partial(self._judge, told=self._told(step)),
                self._real_tokens(step),
                list(step.memo["fake"]),
                gamma=0.0 if lazy else config.r1_weight,
                mode="exact" if lazy else config.r1_mode,
                heads=config.heads,
                sigma=config.r1_sigma,
            )
        logs = {"real": stats.real.mean, "fake": stats.fake.mean, "r1": stats.penalty}
        return Losses({"discriminator": loss}, logs)

    def _lazy_penalty(self, step: Step) -> Losses:
        lazy, config = LazyR1(self.config.r1_interval), self.config
        judge = partial(self._judge, told=self._told(step))
        penalty = lazy.penalty(judge, self._real_tokens(step), gamma=config.r1_weight, heads=config.heads)
        return Losses({"r1": penalty})

    def _judge(self, tokens: list[Tensor], told: Tensor | None) -> list[Tensor]:
        return self.discriminator(tokens, told)

    def _sample(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """The student's samples of real data at its timesteps, and their pixels where somebody looks at them."""
        batch, draws = step.batch, step.draws
        if "data" not in batch:
            raise ValueError(f"data: add trains on real samples; the batch has only {', '.join(batch)}")
        t = self.timesteps[draws.randint(0, len(self.timesteps))]
        x = self.generate(batch["data"], batch["noise"], t, batch["condition"])
        return x, self._pixels(x) if self._needs_pixels else None

    @property
    def _needs_pixels(self) -> bool:
        judged = self.config.adversarial_weight > 0 and not self.judges_latents
        compared = self.config.distill_weight > 0 and self.config.distill_space == "pixel"
        return judged or compared

    def _pixels(self, x: Tensor) -> Tensor:
        return x if self.decode is None else self.decode(x)

    def _tokens(self, x: Tensor, pixels: Tensor | None, condition: Condition, draws: Draws) -> tuple[Tensor, ...]:
        """What the heads are given, differentiable in the samples."""
        if self.judges_latents:
            return self.features(x, condition, draws)
        if self.config.augmentation:
            pixels = augment(pixels, draws, self.config.augmentation)
        return self.features(pixels).tokens

    @torch.no_grad()
    def _real_tokens(self, step: Step) -> list[Tensor]:
        batch = step.batch
        pixels = None if self.judges_latents else self._real_pixels(step)
        return list(self._tokens(batch["data"], pixels, batch["condition"], step.draws.fork("look at real")))

    @torch.no_grad()
    def _real_pixels(self, step: Step) -> Tensor:
        return step.batch["image"] if "image" in step.batch else self._pixels(step.batch["data"])

    @torch.no_grad()
    def _told(self, step: Step) -> Tensor | None:
        """(B, W) what the discriminator is told of each sample: its text, and the image that its input was made of."""
        if "told" not in step.memo:
            parts, dtype = [], next(self.discriminator.parameters()).dtype  # not autocast's
            if self.config.text_condition:
                parts.append(step.batch["condition"].pooled)
            if self.config.image_condition:
                parts.append(self.features(self._real_pixels(step)).embedding)
            step.memo["told"] = torch.cat([part.to(dtype) for part in parts], dim=1) if parts else None
        return step.memo["told"]


class _TwoConditions:
    """The batches of `data`, and with them the condition of the same captions in another text encoder's words."""

    def __init__(self, data: LatentData, conditions: Condition) -> None:
        self.data, self.other = data, copy.copy(data)
        self.other.conditions = conditions

    def batch(self, first: int, draws: Draws) -> dict[str, Any]:
        # Draws are a function of their key: both see the same samples, captions and noise.
        batch, other = (data.batch(first, draws.fork("conditions")) for data in (self.data, self.other))
        return batch | {"target_condition": other["condition"]}

    @property
    def networks(self) -> list[nn.Module]:
        return networks_of(self.data)


def _with_conditions(data: Data, setup: Setup, teacher: Teacher) -> Data:
    known = getattr(data, "conditions", None)
    if known is None or not torch.equal(known.states, setup.conditions.states):
        raise ValueError(
            f"target_teacher {teacher.name} reads captions with a text encoder of its own: needed prompts that are the "
            "captions of the images, in the order of images.conditions"
        )
    return _TwoConditions(data, teacher.encode(setup.prompts))


def _random_like(teacher: Teacher, seed: int) -> nn.Module:
    """A UNet of the teacher's architecture that has learned nothing."""
    if isinstance(teacher.unet, AdapterRole):
        raise ValueError('student_init "random" needs a network of its own: memory.roles "full"; got adapters')
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = type(teacher.unet).from_config(teacher.unet.config)
    return unet.to(teacher.device, memory_format=torch.channels_last)


@contextmanager
def _seeded(draws: Draws) -> Iterator[None]:
    """Within, torch's own generators, which R1's noise comes from, give numbers of this place in the run."""
    devices = [draws.device] if draws.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(draws.shared(0, 2**31))
        yield
