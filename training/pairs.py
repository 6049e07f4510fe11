"""Pairs of noise and the sample that the teacher's deterministic ODE makes of it: targets of the regression loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.diffusion import Schedule

from .condition import Condition
from .networks import conversion_point, predict_guided


class Pairs(NamedTuple):
    """What the regression term learns from.

    Attributes:
        noise: (N, ...) float32, unit noise, the student's input.
        sample: (N, ...) float32, where the teacher's ODE carries it.
        condition: (N,) int64, index into the conditions (for a pipeline: into the prompts).
    """

    noise: Tensor
    sample: Tensor
    condition: Tensor


@torch.no_grad()
def make_pairs(
    teacher: nn.Module,
    conditions: Condition,
    schedule: Schedule,
    prediction_type: str,
    *,
    count: int,
    sample_shape: tuple[int, ...],
    steps: int = 25,
    guidance_scale: float = 1.0,
    unconditional: Condition | None = None,
    batch_size: int = 250,
    seed: int = 0,
) -> Pairs:
    """Solve the teacher's ODE from unit noise with `steps` DDIM steps at trailing timesteps.

    Args:
        teacher: called as `teacher(x_t, t, encoder_hidden_states=condition, return_dict=False)[0]`.
        conditions: of P prompts; one is drawn uniformly per pair.
        schedule, prediction_type: the teacher's own.
        count: number of pairs N.
        sample_shape: of one sample, without the batch.
        guidance_scale, unconditional: classifier-free guidance with the condition of the empty prompt, off at 1.
        batch_size: pairs solved at once; the pairs do not depend on it, save for rounding.
        seed: of noise and conditions.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *sample_shape, generator=generator)
    chosen = torch.randint(len(conditions), (count,), generator=generator)
    # The solver starts from unit noise: where the schedule does not end in it, its last timestep is taken to be.
    timesteps = diffusion.inference_timesteps(steps, "trailing", num_train_timesteps=len(schedule)).tolist()
    samples = []
    for start in range(0, count, batch_size):
        x_t = noise[start : start + batch_size].to(conditions.states)
        condition = conditions[chosen[start : start + batch_size].to(conditions.states.device)]
        for t, next_t in zip(timesteps, [*timesteps[1:], None]):
            many_t = torch.full((len(x_t),), t, device=x_t.device)
            pred = predict_guided(teacher, x_t, many_t, condition, guidance_scale, unconditional)
            point = conversion_point(schedule, t, prediction_type)
            next_point = (1.0, 0.0) if next_t is None else schedule.at(next_t)
            x_t = diffusion.ddim_step(pred, x_t, *point, *next_point, prediction_type)
        samples.append(x_t.float())
    return Pairs(noise.to(conditions.states.device), torch.cat(samples), chosen.to(conditions.states.device))
