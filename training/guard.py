"""Losses that explode, told from those that are merely large, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class LossGuard:
    """Judges the losses of one role's updates, one after the other.

    A loss is refused if it is not finite, or if its size is more than `factor` times the running average of those that
    were accepted, an average below 1 counting as 1: a critic that wins has losses near 0, and a larger one after
    that is no explosion. The first `after` updates are accepted whatever their size.

    Args:
        factor: 0 refuses what is not finite alone.
        device: of the losses.

    Attributes:
        mean: () float32 on the device, the running average.
    """

    DECAY = 0.99

    def __init__(self, factor: float, device: torch.device | str, after: int = 20) -> None:
        self.factor, self.after = factor, after
        self.mean = torch.zeros((), device=device)
        self.judged = 0

    @torch.no_grad()
    def accepts(self, loss: Tensor) -> Tensor:
        """() bool on the device: whether an update with this loss, a scalar, is to be made."""
        size = loss.detach().float().abs()
        accepted = size.isfinite()
        if self.factor > 0 and self.judged >= self.after:
            accepted = accepted & (size <= self.factor * self.mean.clamp(min=1.0))
        self.judged += 1
        share = max(1 - self.DECAY, 1 / self.judged)  # the plain mean at first
        self.mean = torch.where(accepted, torch.lerp(self.mean, size, share), self.mean)
        return accepted

    def state_dict(self) -> dict:
        return {"mean": self.mean, "judged": self.judged}

    def load_state_dict(self, state: dict) -> None:
        self.mean = state["mean"].to(self.mean.device)
        self.judged = state["judged"]
