"""How the loops call a network: one place for diffusers' signature, guidance, and the point to convert at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.diffusion import Schedule

from .condition import Condition, cat


def predict(network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Call a diffusers UNet (or anything called like one): x_t (B, ...), t (B,), condition of B samples.

    Pooled text and sizes are passed on where the condition has sizes: only such networks (SDXL) take either.
    """
    options = {"encoder_hidden_states": condition.states, "return_dict": False}
    if condition.time_ids is not None:
        options["added_cond_kwargs"] = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    return network(x_t, t, **options)[0]


def predict_guided(
    network: nn.Module,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    guidance_scale: float = 1.0,
    unconditional: Condition | None = None,
    *,
    batched: bool = False,
) -> Tensor:
    """`predict` with classifier-free guidance, unless `guidance_scale` is 1; `unconditional` is of one sample.

    Two passes, one after the other: the guided teacher needs no more memory than the unguided one. `batched` makes them
    one pass of twice the batch. The unconditional branch keeps the sizes of `condition`.
    """
    if guidance_scale == 1:
        return predict(network, x_t, t, condition)
    if unconditional is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs `unconditional`, the condition of the empty prompt")
    empty = unconditional.expand(len(condition))
    empty = Condition(empty.states, empty.pooled, condition.time_ids)
    if batched:
        both = predict(network, torch.cat([x_t, x_t]), torch.cat([t, t]), cat([empty, condition]))
        return diffusion.guide(*both.chunk(2), guidance_scale)
    conditional = predict(network, x_t, t, condition)
    return diffusion.guide(predict(network, x_t, t, empty), conditional, guidance_scale)


def predict_data(
    network: nn.Module,
    x_t: Tensor,
    t: int,
    condition: Condition,
    point: tuple[Tensor, Tensor],
    prediction_type: str,
) -> Tensor:
    """What a student's step makes of x_t (B, ...) at timestep t: the data (B, ...), read at the `conversion_point`."""
    pred = predict(network, x_t, torch.full((len(x_t),), t, device=x_t.device), condition)
    return diffusion.to_data(pred, x_t, *point, prediction_type)


def conversion_point(schedule: Schedule, t: int | Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) to read a prediction at t with: each () for an int, (B,) for a tensor of timesteps (B,).

    Where epsilon meets pure noise it says nothing about the data; the usual way (arXiv 2305.08891) is to read it with
    the coefficients from before the terminal SNR was set to zero. Everywhere else the schedule itself holds.
    """
    alpha, sigma = schedule.at(t)
    if prediction_type != "epsilon":
        return alpha, sigma
    original_alpha, original_sigma = schedule.at(t, original=True)
    pure_noise = alpha == 0
    return torch.where(pure_noise, original_alpha, alpha), torch.where(pure_noise, original_sigma, sigma)
