"""How a model is sampled, read from its own scheduler once and turned into a few numbers per step.

Three families are known, each checked against diffusers: DDIM (arXiv 2010.02502, eta = 0), Euler on the probability
flow (2206.00364, no churn) and LCM (2310.04378). All conversions are those of `fastdistill.diffusion`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdistill.diffusion import add_noise, from_scheduler, prediction_type_of, to_data, to_noise
from fastdistill.models import ModelError


@dataclass(frozen=True, eq=False)
class Step:
    """One call of the UNet and what follows it.

    The UNet sees `x = alpha * data + sigma * noise`; the step returns `next_alpha * data + next_sigma * noise`.

    Attributes:
        timestep: () the UNet's time argument, exactly as the scheduler gives it.
        prediction_type: one of `fastdistill.diffusion.PREDICTION_TYPES`.
        alpha, sigma, next_alpha, next_sigma: coefficients as above.
        input_scale: the scheduler's sample times this is what the UNet sees; 1 but for Euler, whose alpha is 1.
        fresh_noise: the noise of the next sample is drawn anew (LCM) and not the predicted one.
        c_out, c_skip: LCM's boundary condition, data becomes `c_out * data + c_skip * x`.
        clip: predicted data is clipped to [-clip, clip]; None for no clipping.
    """

    timestep: Tensor
    prediction_type: str
    alpha: float
    sigma: float
    next_alpha: float
    next_sigma: float
    input_scale: float = 1.0
    fresh_noise: bool = False
    c_out: float = 1.0
    c_skip: float = 0.0
    clip: float | None = None

    def advance(self, prediction: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """The next sample: (B, C, H, W) from the UNet's output, its input and, for `fresh_noise`, new noise."""
        data = to_data(prediction, x, self.alpha, self.sigma, self.prediction_type)
        if self.clip is not None:
            data = data.clamp(-self.clip, self.clip)
        if self.fresh_noise:
            data = self.c_out * data + self.c_skip * x
        if self.next_sigma == 0:
            return self.next_alpha * data
        if not self.fresh_noise:
            noise = to_noise(prediction, x, self.alpha, self.sigma, self.prediction_type)
        return add_noise(data, noise, self.next_alpha, self.next_sigma)

    def affine(self) -> tuple[float, float, float]:
        """(a, b, c) with `advance(prediction, x, noise) == a * x + b * prediction + c * noise`. Needs `clip` None.

        A straight line through the origin is known from its values on the three unit vectors.
        """
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        return (
            self.advance(zero, one, zero).item(),
            self.advance(one, zero, zero).item(),
            self.advance(zero, zero, one).item() if self.fresh_noise else 0.0,
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """All steps of one sampling run. `initial_scale` times standard noise is the scheduler's first sample."""

    steps: tuple[Step, ...]
    initial_scale: float

    @property
    def fresh_noises(self) -> int:
        """How many noise tensors are drawn besides the first: the last step of LCM needs none."""
        return sum(step.fresh_noise and step.next_sigma != 0 for step in self.steps)


def make_plan(scheduler, num_steps: int) -> Plan:
    """The plan of `num_steps` steps of a diffusers scheduler; sets its timesteps.

    Raises:
        ModelError: a scheduler that is not known, or a setting of it that is not.
        ValueError: a number of steps that the scheduler does not have, or a prediction that says nothing about the
            data at the first timestep ("epsilon" at zero-terminal SNR).
    """
    steps_of = check_scheduler(scheduler)
    try:
        scheduler.set_timesteps(num_steps)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"steps={num_steps}: {type(scheduler).__name__} of this model refuses: {reason}") from error
    steps = steps_of(scheduler)
    for step in steps:
        try:
            step.affine()
        except ValueError as error:  # the conversion does not exist
            place = f"{type(scheduler).__name__} visits t = {step.timestep}"
            raise ValueError(f"steps={num_steps}: {place}, where {error}") from error
    return Plan(steps, float(scheduler.init_noise_sigma))


def check_scheduler(scheduler) -> Callable[..., tuple[Step, ...]]:
    """The function that reads this scheduler's steps.

    Raises:
        ModelError: naming the scheduler or its setting.
    """
    name = type(scheduler).__name__
    if name not in _FAMILIES:
        raise ModelError(
            f"scheduler {name}: this engine samples {', '.join(_FAMILIES)}; give the folder one of these "
            f"(diffusers: DDIMScheduler.from_config(pipeline.scheduler.config))"
        )
    if scheduler.config.get("thresholding"):
        raise ModelError(f"scheduler {name} with thresholding=True: dynamic thresholding is not supported")
    if name == "EulerDiscreteScheduler" and prediction_type_of(scheduler) == "sample":
        raise ModelError('scheduler EulerDiscreteScheduler with prediction_type="sample": not supported')
    return _FAMILIES[name]


def _ddim_steps(scheduler) -> tuple[Step, ...]:
    schedule = from_scheduler(scheduler, dtype=torch.float64)
    final_alpha_squared = float(scheduler.final_alpha_cumprod)
    final = final_alpha_squared**0.5, (1 - final_alpha_squared) ** 0.5
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    # For some counts (61 is the first) rounding gives trailing spacing one timestep too many, t = -1.
    timesteps = [t for t in scheduler.timesteps if t >= 0]
    steps = []
    for t in timesteps:
        alpha, sigma = _at(schedule, t)
        previous = int(t) - stride
        next_alpha, next_sigma = _at(schedule, previous) if previous >= 0 else final
        steps.append(
            Step(t, prediction_type_of(scheduler), alpha, sigma, next_alpha, next_sigma, clip=_clip(scheduler))
        )
    return tuple(steps)


def _euler_steps(scheduler) -> tuple[Step, ...]:
    """Its sample is `data + sigma * noise`; the UNet sees that over sqrt(1 + sigma^2), which is variance preserving."""
    steps = []
    sigmas = scheduler.sigmas.double().tolist()
    for t, sigma, next_sigma in zip(scheduler.timesteps, sigmas, sigmas[1:]):
        scale = (1 + sigma**2) ** -0.5
        steps.append(Step(t, prediction_type_of(scheduler), scale, scale * sigma, 1.0, next_sigma, input_scale=scale))
    return tuple(steps)


def _lcm_steps(scheduler) -> tuple[Step, ...]:
    schedule = from_scheduler(scheduler, dtype=torch.float64)
    steps = []
    timesteps = list(scheduler.timesteps)
    for t, following in zip(timesteps, [*timesteps[1:], None]):
        alpha, sigma = _at(schedule, t)
        next_alpha, next_sigma = (1.0, 0.0) if following is None else _at(schedule, following)
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(float(t))
        steps.append(
            Step(
                t,
                prediction_type_of(scheduler),
                alpha,
                sigma,
                next_alpha,
                next_sigma,
                fresh_noise=True,
                c_out=c_out,
                c_skip=c_skip,
                clip=_clip(scheduler),
            )
        )
    return tuple(steps)


_FAMILIES = {"DDIMScheduler": _ddim_steps, "EulerDiscreteScheduler": _euler_steps, "LCMScheduler": _lcm_steps}


def _at(schedule, t: Tensor | int) -> tuple[float, float]:
    alpha, sigma = schedule.at(int(t))
    return float(alpha), float(sigma)


def _clip(scheduler) -> float | None:
    return float(scheduler.config.clip_sample_range) if scheduler.config.get("clip_sample") else None


def _scales_after(plan: Plan, latent_scale: float) -> list[float]:
    """What each step's result is multiplied by before the next network sees it: the UNet, at last the decoder."""
    return [*(step.input_scale for step in plan.steps[1:]), latent_scale]


class ExplicitSteps:
    """The steps as the scheduler writes them: conversions of `fastdistill.diffusion`, then every scale by itself."""

    def __init__(self, plan: Plan, latent_scale: float) -> None:
        """`latent_scale` is what the last sample is multiplied by before it is decoded (1 / VAE scaling factor)."""
        self._steps = plan.steps
        self._scales = _scales_after(plan, latent_scale)
        self._initial = (plan.initial_scale, plan.steps[0].input_scale)

    def begin(self, noise: Tensor) -> Tensor:
        """The UNet's first input from standard noise."""
        return noise * self._initial[0] * self._initial[1]

    def advance(self, index: int, prediction: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """The UNet's next input, or after the last step the decoder's input, from step `index`."""
        return self._steps[index].advance(prediction.to(x.dtype), x, noise) * self._scales[index]


class FoldedSteps:
    """The same in at most three numbers per step: `x <- a * x + b * prediction + c * noise`, every scale folded in."""

    def __init__(self, plan: Plan, latent_scale: float) -> None:
        scales = _scales_after(plan, latent_scale)
        self._coefficients = [
            tuple(number * scale for number in step.affine()) for step, scale in zip(plan.steps, scales)
        ]
        self._initial = plan.initial_scale * plan.steps[0].input_scale

    def begin(self, noise: Tensor) -> Tensor:
        return noise if self._initial == 1 else noise * self._initial

    def advance(self, index: int, prediction: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        a, b, c = self._coefficients[index]
        prediction = prediction.to(x.dtype)
        y = prediction * b if a == 0 else torch.add(x * a, prediction, alpha=b)
        return y if c == 0 else y.add_(noise, alpha=c)
