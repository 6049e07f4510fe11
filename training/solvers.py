"""Deterministic samplers of a teacher's probability-flow ODE, by name: from unit noise to a sample of the data.

Not diffusers' schedulers: from alpha exactly 0, where unit noise is the truth, `DPMSolverMultistepScheduler` starts at
alpha = 2^-12 and `HeunDiscreteScheduler` at the alpha from before the terminal SNR was set to zero; neither knows the
flow that InstaFlow's networks predict. The formulas below divide by sigma and by alpha + sigma only, which are not 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.diffusion import Schedule

from .condition import Condition
from .networks import conversion_point, predict_guided


class Point(NamedTuple):
    """A place on the path: the network's time argument there, () or None at the data, and the coefficients, ()."""

    time: Tensor | None
    alpha: Tensor
    sigma: Tensor


Ends = Callable[[Tensor, Point], tuple[Tensor, Tensor]]  # (data, noise) that the network sees in x at a point


@torch.no_grad()
def solve(
    network: nn.Module,
    noise: Tensor,
    condition: Condition,
    schedule: Schedule,
    prediction_type: str,
    *,
    solver: str = "euler",
    steps: int = 25,
    guidance_scale: float = 1.0,
    unconditional: Condition | None = None,
) -> Tensor:
    """Carry unit noise to data along the teacher's ODE, at trailing timesteps.

    Args:
        network: called as a diffusers UNet, in the dtype of the condition.
        noise: (B, ...) float32 or float64, standard normal. Where the schedule does not end in pure noise, its last
            timestep is taken to.
        condition: of the B samples.
        schedule, prediction_type: the network's own.
        solver: a name from `SOLVERS`; what one costs says `network_calls`.
        steps: 1 … T.
        guidance_scale, unconditional: classifier-free guidance with the condition of the empty prompt, off at 1.

    Returns:
        (B, ...) in the dtype of `noise`: the arithmetic of the solver is not rounded to the network's dtype.

    Raises:
        ValueError: an unknown solver, steps outside the schedule, guidance without `unconditional`, an "epsilon"
            network on a schedule that ends in pure noise and was never anything else.
    """
    integrate = _INTEGRATORS[check_solver(solver)]
    path = _path(schedule, steps, prediction_type, noise.device)
    if prediction_type == "epsilon" and path[0].alpha == 0:
        raise ValueError('prediction_type "epsilon" says nothing about the data at alpha = 0, where this path starts')

    def ends(x: Tensor, point: Point) -> tuple[Tensor, Tensor]:
        times = point.time.expand(len(x))
        seen = x.to(condition.states.dtype)
        pred = predict_guided(network, seen, times, condition, guidance_scale, unconditional).to(x.dtype)
        of_x = (pred, x, point.alpha, point.sigma, prediction_type)
        return diffusion.to_data(*of_x), diffusion.to_noise(*of_x)

    return integrate(ends, noise, path)


def check_solver(solver: str) -> str:
    """Return `solver` if it is one of `SOLVERS`, else raise a ValueError that lists them."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    return solver


def network_calls(solver: str, steps: int) -> int:
    """How often a solver asks the network in `steps` steps; with guidance each of these is two passes."""
    return 2 * steps - 1 if check_solver(solver) == "heun" else steps


def _path(schedule: Schedule, steps: int, prediction_type: str, device: torch.device) -> list[Point]:
    """From the last timestep to the data: steps + 1 points. Coefficients stay on the CPU, where reading one is free."""
    schedule = schedule.to("cpu")
    timesteps = diffusion.inference_timesteps(steps, "trailing", num_train_timesteps=len(schedule)).tolist()
    times = schedule.timesteps.to(device)
    path = [Point(times[t], *conversion_point(schedule, t, prediction_type)) for t in timesteps]
    return [*path, Point(None, torch.tensor(1.0), torch.tensor(0.0))]


def _euler(ends: Ends, x: Tensor, path: Sequence[Point]) -> Tensor:
    """DDIM (arXiv 2010.02502), the Euler step of the path's straight coordinates: x / (alpha + sigma) over tau."""
    for point, following in pairwise(path):
        data, noise = ends(x, point)
        x = diffusion.add_noise(data, noise, following.alpha, following.sigma)
    return x


def _heun(ends: Ends, x: Tensor, path: Sequence[Point]) -> Tensor:
    """Heun's second-order method in the straight coordinates, which are finite at both ends of every path.

    The step to the data is Euler's: there is no network at sigma = 0.
    """
    for point, following in pairwise(path):
        data, noise = ends(x, point)
        x = diffusion.add_noise(data, noise, following.alpha, following.sigma)
        if following.time is None:
            break
        next_data, next_noise = ends(x, following)
        # Half the change of the velocity, times the step in tau, times alpha + sigma of the new point.
        width = following.sigma * point.alpha - following.alpha * point.sigma
        x = x + width / (2 * (point.alpha + point.sigma)) * ((next_noise - next_data) - (noise - data))
    return x


def _dpmpp(ends: Ends, x: Tensor, path: Sequence[Point]) -> Tensor:
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), of first order in the first and in the last step.

    lambda = log(alpha / sigma) is -inf at pure noise. A step from there is infinitely wide, so the one behind it gets
    no extrapolation either; `alpha' * exp(-h)` of the paper is written `alpha * sigma' / sigma`, which is finite.
    """
    before, width_before = None, None
    for point, following in pairwise(path):
        data, _ = ends(x, point)
        width = _log_snr(following) - _log_snr(point)
        estimate = data
        if before is not None and following.time is not None:
            estimate = data + (width / (2 * width_before)).to(data.dtype) * (data - before)
        kept = following.sigma / point.sigma
        x = kept * x + (following.alpha - point.alpha * kept) * estimate
        before, width_before = data, width
    return x


def _log_snr(point: Point) -> Tensor:
    """Half the logarithm of the signal-to-noise ratio, () float64: -inf at pure noise, inf at the data."""
    return (point.alpha.double() / point.sigma.double()).log()


_INTEGRATORS: dict[str, Callable[[Ends, Tensor, Sequence[Point]], Tensor]] = {
    "euler": _euler,
    "heun": _heun,
    "dpmpp": _dpmpp,
}
SOLVERS = tuple(_INTEGRATORS)
