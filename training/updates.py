"""What happens between a loss and the next forward pass: clipping, warm-up, the optimiser's step, the EMA."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class RoleUpdater:
    """The optimiser of one role. It counts updates, and only updates: warm-up and decay are in its own updates.

    Attributes:
        attempts: optimiser steps tried; the schedule counts these.
        skipped: of them, those left out because the gradient was not finite.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float,
        schedule: Callable[[int], float],
    ):
        """`schedule(n)` is the factor of the learning rate at update n, counted from 0."""
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay)
        self.learning_rate, self.max_grad_norm, self.schedule = learning_rate, max_grad_norm, schedule
        self.attempts = self.skipped = 0

    @property
    def updates(self) -> int:
        """Optimiser steps taken."""
        return self.attempts - self.skipped

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's share."""
        loss.backward()

    def step(self) -> bool:
        """Update the role from the gradients there are; False if they are not finite, and nothing was changed."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self.schedule(self.attempts)
        self.attempts += 1
        taken = math.isfinite(norm)
        if taken:
            self.optimizer.step()
        else:
            self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self.optimizer.state_dict(), "attempts": self.attempts, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["adamw"])
        self.attempts, self.skipped = state["attempts"], state["skipped"]


def warm_up_then_decay(updates: int, warm_up: int, decay: float) -> Callable[[int], float]:
    """Learning-rate factor: linear from 0 over `warm_up` updates, 1, then linear to 0 over the last share `decay`."""

    def factor(update: int) -> float:
        up = min(1.0, (update + 1) / (warm_up + 1))
        down = 1.0 if decay == 0 else min(1.0, (updates - update) / (decay * updates))
        return up * max(0.0, down)

    return factor


class EMA:
    """A moving average of a network's parameters, in their dtype, as a network of its own that never trains.

    Early on the decay is at most (1 + n) / (10 + n), so that the average forgets where it started.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, value in zip(self.network.parameters(), network.parameters(), strict=True):
            average.lerp_(value, 1 - decay)
        for average, value in zip(self.network.buffers(), network.buffers(), strict=True):
            average.copy_(value)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.updates = state["updates"]
