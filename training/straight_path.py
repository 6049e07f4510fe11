"""A network's velocity on the straight path from noise to data, whatever it was trained to predict on which path.

Rectified flow (arXiv 2209.03003) moves along `x_t = t * data + (1 - t) * noise`, "instaflow" in
`fastdistill.diffusion`. A variance-preserving network knows the same samples on another path, at another scale: at its
point of the same ratio of noise to data. There its prediction gives the velocity data - noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.diffusion import Schedule
from fastdistill.losses import straightness

from .condition import Condition
from .networks import conversion_point, predict_guided


class StraightPath:
    """How networks of one parameterisation are asked for the velocity data - noise, at t from 0 (noise) to 1 (data).

    A variance-preserving network sees x_t times alpha + sigma at the timestep whose sigma / (alpha + sigma) is 1 - t,
    interpolated between the timesteps of the schedule. So the teacher itself is a flow, and Euler steps of that flow
    are DDIM steps. A flow network ("flow_prediction", "instaflow") sees x_t itself.

    Closer to noise than the schedule goes (Stable Diffusion's ends at 1 - t = 0.936), a network is asked at its last
    timestep, its prediction is read there as in a sampler's first step (`conversion_point`), and the velocity is the
    one from x_t to that data. So at t = 0 one Euler step is the one step of DDIM, whatever the schedule.

    Args:
        schedule, prediction_type: of the networks.
    """

    def __init__(self, schedule: Schedule, prediction_type: str) -> None:
        self.schedule, self.prediction_type = schedule, diffusion.check_prediction_type(prediction_type)
        alpha, sigma = schedule.alpha.double(), schedule.sigma.double()
        self._shares = sigma / (alpha + sigma)  # of noise, ascending, as the timesteps
        self._timesteps = schedule.timesteps.double()
        last = len(schedule) - 1
        self._end = conversion_point(schedule, last, self.prediction_type)
        # Where epsilon meets pure noise it is read elsewhere: the last point that is read where it is comes before.
        readable = last if bool(schedule.at(last)[0] == self._end[0]) else last - 1
        self._last_share = float(self._shares[readable])

    @property
    def is_flow(self) -> bool:
        """Whether the networks predict a velocity, and see the straight path itself."""
        return self.prediction_type in ("flow_prediction", "instaflow")

    @property
    def start(self) -> int:
        """The network's time argument at pure noise."""
        return int(self._timesteps[-1])

    def timestep(self, share: Tensor) -> Tensor:
        """(B,) the network's time argument where 1 - t, the share of noise, is `share` (B,): as in the table there."""
        share = share.double()
        above = torch.searchsorted(self._shares, share).clamp(1, len(self._shares) - 1)
        low, high = self._shares[above - 1], self._shares[above]
        weight = ((share - low) / (high - low)).clamp(0, 1)
        return torch.lerp(self._timesteps[above - 1], self._timesteps[above], weight).float()

    def velocity(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: float = 1.0,
        unconditional: Condition | None = None,
    ) -> Tensor:
        """data - noise (B, ...) in x_t's dtype, of x_t (B, ...) at t (B,) in [0, 1); guided as `predict_guided`.

        All but the network is affine in its prediction, so guiding that guides the velocity (2309.06380).
        """
        share = 1.0 - t.to(torch.promote_types(torch.float32, x_t.dtype))
        scale = torch.ones_like(share) if self.is_flow else 1.0 / torch.hypot(1.0 - share, share)
        x = (over(scale, x_t) * x_t).to(x_t.dtype)
        pred = predict_guided(network, x, self.timestep(share), condition, guidance_scale, unconditional)
        beyond = share > self._last_share
        end_alpha, end_sigma = (value.to(share) for value in self._end)
        alpha = torch.where(beyond, end_alpha, scale * (1.0 - share))
        sigma = torch.where(beyond, end_sigma, scale * share)
        velocity = diffusion.convert(pred, x, alpha, sigma, self.prediction_type, "instaflow")
        if self._last_share == 1:
            return velocity
        data = diffusion.to_data(pred, x, alpha, sigma, self.prediction_type)
        return torch.where(over(beyond, x_t), (data - x_t) / over(share, x_t), velocity)


def over(per_sample: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, …), to broadcast over samples `like`."""
    return per_sample.reshape(-1, *(1,) * (like.ndim - 1))


@torch.no_grad()
def flow_straightness(
    network: nn.Module,
    path: StraightPath,
    conditions: Condition,
    sample_shape: tuple[int, ...],
    *,
    samples: int = 128,
    steps: int = 100,
    guidance_scale: float = 1.0,
    unconditional: Condition | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> float:
    """`fastdistill.losses.straightness` of a network's flow at the guidance in use: 0 is straight, per element.

    Args:
        conditions: of P prompts; one is drawn per sample.
        sample_shape: of one sample, without the batch.
        samples, steps: noises that are simulated, in so many Euler steps each (a pass of the network, two if guided).
        guidance_scale, unconditional: as in `predict_guided`.
        batch_size: samples at once; the figure does not depend on it, save for rounding.
        seed: of noise and prompts.
    """
    device = conditions.states.device
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, *sample_shape, generator=generator).to(conditions.states)
    chosen = torch.randint(len(conditions), (samples,), generator=generator).to(device)
    total = 0.0
    for start in range(0, samples, batch_size):
        some, condition = noise[start : start + batch_size], conditions[chosen[start : start + batch_size]]

        def velocity(x: Tensor, t: Tensor, condition: Condition = condition) -> Tensor:
            return path.velocity(network, x, t, condition, guidance_scale, unconditional)

        total += float(straightness(velocity, some, steps)) * len(some)
    return total / samples
