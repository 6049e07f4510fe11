"""Pairs of noise and the sample that the teacher's deterministic ODE makes of it: the targets of the regression loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.diffusion import Schedule


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
    conditions: Tensor,
    schedule: Schedule,
    prediction_type: str,
    *,
    count: int,
    sample_shape: tuple[int, ...],
    steps: int = 25,
    guidance_scale: float = 1.0,
    unconditional: Tensor | None = None,
    batch_size: int = 250,
    seed: int = 0,
) -> Pairs:
    """Solve the teacher's ODE from unit noise with `steps` DDIM steps at trailing timesteps.

    Args:
        teacher: called as `teacher(x_t, t, encoder_hidden_states=condition, return_dict=False)[0]`.
        conditions: (P, L, D), one is drawn uniformly per pair.
        schedule, prediction_type: the teacher's own.
        count: number of pairs N.
        sample_shape: of one sample, without the batch.
        guidance_scale, unconditional: classifier-free guidance with the condition (1, L, D), off at 1.
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
        x_t = noise[start : start + batch_size].to(conditions)
        condition = conditions[chosen[start : start + batch_size].to(conditions.device)]
        for t, next_t in zip(timesteps, [*timesteps[1:], None]):
            pred = predict_guided(teacher, x_t, t, condition, guidance_scale, unconditional)
            next_point = (1.0, 0.0) if next_t is None else schedule.at(next_t)
            x_t = diffusion.ddim_step(pred, x_t, *solver_point(schedule, t, prediction_type), *next_point, prediction_type)
        samples.append(x_t.float())
    return Pairs(noise.to(conditions.device), torch.cat(samples), chosen.to(conditions.device))


def predict(network: nn.Module, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """Call a diffusers UNet (or anything called like one): x_t (B, ...), t (B,) int64, condition (B, L, D)."""
    return network(x_t, t, encoder_hidden_states=condition, return_dict=False)[0]


def predict_guided(
    network: nn.Module, x_t: Tensor, t: int, condition: Tensor, guidance_scale: float, unconditional: Tensor | None
) -> Tensor:
    """`predict` at one timestep for all, with classifier-free guidance unless `guidance_scale` is 1."""
    t = torch.full((len(x_t),), t, device=x_t.device)
    conditional = predict(network, x_t, t, condition)
    if guidance_scale == 1:
        return conditional
    if unconditional is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs `unconditional`, the condition of the empty prompt")
    return diffusion.guide(predict(network, x_t, t, unconditional.expand_as(condition)), conditional, guidance_scale)


def solver_point(schedule: Schedule, t: int, prediction_type: str) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) to read a prediction at t with: the original ones where epsilon meets pure noise (2305.08891)."""
    alpha, sigma = schedule.at(t)
    if prediction_type == "epsilon" and alpha == 0:
        return schedule.at(t, original=True)
    return alpha, sigma
