"""How the loops call a network: one place for diffusers' signature, guidance, and the point to convert at."""

from __future__ import annotations

from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.diffusion import Schedule


def predict(network: nn.Module, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """Call a diffusers UNet (or anything called like one): x_t (B, ...), t (B,) int64, condition (B, L, D)."""
    return network(x_t, t, encoder_hidden_states=condition, return_dict=False)[0]


def predict_guided(
    network: nn.Module,
    x_t: Tensor,
    t: Tensor,
    condition: Tensor,
    guidance_scale: float = 1.0,
    unconditional: Tensor | None = None,
) -> Tensor:
    """`predict` with classifier-free guidance, unless `guidance_scale` is 1; `unconditional` is (1, L, D)."""
    conditional = predict(network, x_t, t, condition)
    if guidance_scale == 1:
        return conditional
    if unconditional is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs `unconditional`, the condition of the empty prompt")
    return diffusion.guide(predict(network, x_t, t, unconditional.expand_as(condition)), conditional, guidance_scale)


def conversion_point(schedule: Schedule, t: int, prediction_type: str) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) to read a prediction at t with, each ().

    Where epsilon meets pure noise it says nothing about the data; the usual way (arXiv 2305.08891) is to read it with
    the coefficients from before the terminal SNR was set to zero.
    """
    alpha, sigma = schedule.at(t)
    if prediction_type == "epsilon" and alpha == 0:
        return schedule.at(t, original=True)
    return alpha, sigma
