"""Eight Gaussians on a ring: a teacher in closed form, a student small enough to train in seconds, and three figures.

The data have about unit variance per coordinate, so unit noise is on their scale. What such a toy shows is that an
algorithm is wired correctly; it cannot rank methods or settings.
"""

import math

import torch
import torch.nn.functional as F
from fastdistill.training import Condition, Features
from torch import nn

from fastdistill import diffusion
from fastdistill.metrics import sliced_wasserstein

MODES, RADIUS, STD = 8, math.sqrt(2), 0.1
SHAPE = (2,)
SCHEDULE = diffusion.scaled_linear(zero_terminal_snr=True)
PREDICTION_TYPE = "v_prediction"
CONDITION = Condition(torch.zeros(1, 1, 1), torch.zeros(1, 1))


def ring_centres():
    """(8, 2), the means of the mixture."""
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)


def ring_samples(count, seed=0):
    """(count, 2) draws of the mixture."""
    generator = torch.Generator().manual_seed(seed)
    mode = torch.randint(MODES, (count,), generator=generator)
    return ring_centres()[mode] + STD * torch.randn(count, 2, generator=generator)


class RingTeacher(nn.Module):
    """The mixture's exact denoiser, called as a UNet: (x_t (B, 2), t (B,)) to its v, or whatever else is asked for."""

    def __init__(self, schedule=SCHEDULE, prediction_type=PREDICTION_TYPE):
        super().__init__()
        self.centres = nn.Parameter(ring_centres(), requires_grad=False)
        self.schedule, self.prediction_type = schedule, prediction_type

    def forward(self, x_t, t, encoder_hidden_states=None, return_dict=False):
        alpha, sigma = self.schedule.at(t)
        mu = self.denoise(x_t, alpha[:, None], sigma[:, None])
        return (diffusion.convert(mu, x_t, alpha, sigma, "sample", self.prediction_type),)

    def denoise(self, x_t, alpha, sigma):
        """E[data | x_t]: of each mode, weighted with the mode's probability given x_t."""
        variance = alpha**2 * STD**2 + sigma**2
        off = x_t[:, None] - alpha[..., None] * self.centres
        probability = torch.softmax(-off.square().sum(-1) / (2 * variance), dim=1)[..., None]
        of_each_mode = self.centres + (alpha * STD**2 / variance)[..., None] * off
        return (probability * of_each_mode).sum(1)


class StudentMLP(nn.Module):
    """Called as a UNet: (x_t (B, 2), t (B,) index or time in 0 … 1000) to a prediction (B, 2) of whatever type."""

    def __init__(self, width=128, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList([nn.Linear(2 + 8, width), nn.Linear(width, width), nn.Linear(width, width)])
            self.out = nn.Linear(width, 2)

    def forward(self, x_t, t, encoder_hidden_states=None, return_dict=False):
        time = torch.as_tensor(t, dtype=x_t.dtype).expand(len(x_t))[:, None] / 1000
        waves = time * torch.tensor([1.0, 2.0, 4.0, 8.0]) * (math.pi / 2)
        h = torch.cat([x_t, waves.sin(), waves.cos()], dim=1)
        for layer in self.layers:
            h = F.silu(layer(h))
        return (self.out(h),)


def ring_scores(samples):
    """Of samples (N, 2): sliced Wasserstein-2 distance to the mixture, modes found of 8, share of the rarest mode.

    A sample belongs to a mode within half the distance of two neighbours; a mode is found with 2 % of the samples.
    """
    samples = samples.detach()
    distance = torch.cdist(samples, ring_centres())
    belongs = distance < RADIUS * math.sin(math.pi / MODES)
    shares = belongs.float().mean(0)
    return sliced_wasserstein(samples, ring_samples(4000), 128), int((shares >= 0.02).sum()), float(shares.min())


class RingFeatures(nn.Module):
    """A frozen network of random features of points (B, 2), as a `FeatureNetwork` is of images."""

    def __init__(self, channels=16, tokens=8, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.widths, self.width, self.tokens = (channels, channels), channels, tokens
        self.first = nn.Parameter(torch.randn(2, channels * tokens, generator=generator))
        self.shift = nn.Parameter(torch.randn(channels * tokens, generator=generator))
        scale = (channels * tokens) ** -0.5
        self.second = nn.Parameter(scale * torch.randn(channels * tokens, channels * tokens, generator=generator))

    def forward(self, points):
        first = torch.tanh(points @ self.first + self.shift)  # no waves: far away must not look like near by
        second = torch.tanh(4 * first @ self.second + self.shift)
        layers = [h.unflatten(1, (-1, self.tokens)) for h in (first, second)]
        return Features(tuple(layers), layers[-1].mean(2))


class RingData:
    """Real points of the mixture with unit noise, as a `Data`."""

    def __init__(self, count=20_000, seed=0):
        self.points = ring_samples(count, seed)

    def batch(self, first, draws):
        data = self.points[draws.randint(0, len(self.points))]
        condition = CONDITION.expand(draws.batch_size)
        return {"noise": draws.randn(2), "condition": condition, "data": data}
