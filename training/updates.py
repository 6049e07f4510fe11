"""What happens between a loss and the next forward pass: clipping, warm-up, the optimiser's step, the EMA."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class RoleUpdater:
    """The optimiser of one role. It counts updates, and only updates: warm-up and decay are in its own updates.

    Attributes:
        updates: optimiser steps taken so far.
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
        self.updates = 0

    def step(self, loss: Tensor) -> Tensor:
        """Update the role from `loss`; returns the gradient's norm before clipping, a scalar tensor.

        Raises:
            FloatingPointError: the gradient is not finite. The parameters are as they were.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite at update {self.updates} (norm {norm.item()})")
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self.schedule(self.updates)
        self.optimizer.step()
        self.updates += 1
        return norm


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
