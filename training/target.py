"""What ADD draws its student's samples towards: a frozen teacher's denoising of them, on the teacher's own schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.diffusion import Schedule

from .condition import Condition
from .networks import conversion_point, predict, predict_guided


@dataclass(frozen=True)
class Target:
    """A teacher as the target of distillation (arXiv 2311.17042, section 3).

    Attributes:
        network: called as a diffusers UNet; frozen.
        schedule, prediction_type: its own, whatever the student is noised with.
        decode: its latents to pixels; None where samples have no other form.
        encode: pixels to its latents; None where the student's samples are its latents already.
        steps: of deterministic denoising from the timestep that was drawn down to the data.
        guidance_scale, unconditional: classifier-free guidance, 1 for none, and the condition of the empty prompt.
        negative: the condition of what images shall not be, one sample, for noise-free score distillation.
        condition: the name in a batch of the conditions that this network understands.
        batched_guidance: both passes of guidance at once.
    """

    network: nn.Module
    schedule: Schedule
    prediction_type: str
    decode: Callable[[Tensor], Tensor] | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    steps: int = 1
    guidance_scale: float = 1.0
    unconditional: Condition | None = None
    negative: Condition | None = None
    condition: str = "condition"
    batched_guidance: bool = False

    @torch.no_grad()
    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The data (B, ...) that x_t (B, ...) at timesteps t (B,) comes from, in `steps` equal DDIM steps (eta = 0)."""
        for left in range(self.steps, 0, -1):
            pred = predict_guided(
                self.network,
                x_t,
                t,
                condition,
                self.guidance_scale,
                self.unconditional,
                batched=self.batched_guidance,
            )
            point = conversion_point(self.schedule, t, self.prediction_type)
            if left == 1:
                break
            after = t * (left - 1) // left
            x_t = diffusion.ddim_step(pred, x_t, *point, *self.schedule.at(after), self.prediction_type)
            t = after
        return diffusion.to_data(pred, x_t, *point, self.prediction_type)

    @torch.no_grad()
    def noises(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """The noise (B, ...) seen in x_t under the prompt, the empty one and the negative one."""
        point = conversion_point(self.schedule, t, self.prediction_type)

        def noise(of: Condition) -> Tensor:
            return diffusion.to_noise(predict(self.network, x_t, t, of), x_t, *point, self.prediction_type)

        empty, negative = (self._of_batch(one, condition) for one in (self.unconditional, self.negative))
        return noise(condition), noise(empty), noise(negative)

    @staticmethod
    def _of_batch(one: Condition, condition: Condition) -> Condition:
        of_all = one.expand(len(condition))
        return Condition(of_all.states, of_all.pooled, condition.time_ids)
