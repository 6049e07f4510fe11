"""What happens between a loss and the next forward pass: clipping, warm-up, the optimiser's step, the EMA."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.optim import FusedAdamW
from fastdistill.optim.shards import is_sharded, local

from .guard import LossGuard
from .world import World


class RoleUpdater:
    """The optimiser of one role. It counts updates, and only updates: warm-up and decay are in its own updates.

    Clipping, AdamW and the average are one sweep; a gradient that is not finite leaves all three out, which is counted
    on the device (`fastdistill.optim.FusedAdamW`).

    Attributes:
        attempts: optimiser steps tried; the schedule counts these.
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
        state_bits: int = 32,
        explosion: float = 0.0,
        average: EMA | None = None,
        world: World | None = None,
    ):
        """`schedule(n)` is the factor of the learning rate at update n, counted from 0; `average` follows `network`.

        state_bits: of AdamW's moments, 32 or 8.
        explosion: see `LossGuard`.
        world: the processes whose gradients are averaged.
        """
        trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        averages = None if average is None else dict(average.network.named_parameters())
        self.optimizer = FusedAdamW(
            [p for _, p in trained],
            lr=learning_rate,
            betas=betas,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            state_bits=state_bits,
            ema=None if averages is None else [averages[name] for name, _ in trained],
        )
        self.network, self.average, self.world = network, average, world or World()
        self.guard = LossGuard(explosion, trained[0][1].device)
        self.learning_rate, self.schedule = learning_rate, schedule
        self.attempts = 0

    @property
    def skipped(self) -> int:
        """Steps left out because the gradient was not finite; waits for the device."""
        return int(self.optimizer.skipped)

    @property
    def updates(self) -> int:
        """Steps taken; waits for the device."""
        return self.attempts - self.skipped

    @property
    def current_learning_rate(self) -> float:
        """Of the next update."""
        return self.learning_rate * self.schedule(self.attempts)

    def step(self, loss: Tensor | None = None) -> None:
        """Update the role, and its average, from the gradients that its parameters have, and clear these.

        loss: () what the gradients are of; one that explodes leaves the update out, as a gradient that is not finite
            does.
        """
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if loss is not None and gradients:
            self._refuse_explosion(loss.detach().clone(), gradients)
        # FSDP has averaged those of sharded parameters in the backward pass.
        self.world.average(g for g in gradients if not is_sharded(g))
        for group in self.optimizer.param_groups:
            group["lr"] = self.current_learning_rate
        if self.average is not None:
            self.optimizer.ema_decay = self.average.decay_at(self.attempts)
        skipped = self.optimizer.skipped.clone()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.attempts += 1
        if self.average is not None:
            self.average.copy_buffers(self.network, where=self.optimizer.skipped == skipped)

    def _refuse_explosion(self, loss: Tensor, gradients: list[Tensor]) -> None:
        """On the device: a gradient that is not finite is left out by all processes."""
        self.world.average([loss])  # all judge the loss of the whole batch, as one process would
        refused = torch.where(self.guard.accepts(loss), 0.0, math.nan)
        for part in map(local, gradients):
            if part.numel() > 0:  # a process may hold nothing of a small parameter
                part.add_(refused.to(part.dtype))
                break

    def like(self) -> dict[str, Any]:
        """Of the form of `state_dict`, to tell how its tensors are sharded."""
        trained = (p for group in self.optimizer.param_groups for p in group["params"])
        keys = ("exp_avg", "exp_avg_sq", "master")
        return {"adamw": {"state": {index: dict.fromkeys(keys, p) for index, p in enumerate(trained)}}}

    def state_dict(self) -> dict[str, Any]:
        return {
            "adamw": self.optimizer.state_dict(),
            "guard": self.guard.state_dict(),
            "attempts": self.attempts,
            "skipped": self.skipped,
            "grad_norm": self.optimizer.grad_norm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["adamw"])
        self.guard.load_state_dict(state["guard"])
        self.attempts = state["attempts"]
        self.optimizer.skipped.fill_(state["skipped"])
        if state["grad_norm"] is not None:
            self.optimizer.grad_norm = state["grad_norm"].to(self.optimizer.skipped.device)


def warm_up_then_decay(
    updates: int, warm_up: int, decay: float, shape: str = "linear", lowest: float = 0.0
) -> Callable[[int], float]:
    """Learning-rate factor of an update, counted from 0.

    Linear from 0 over `warm_up` updates, then 1, then down to `lowest` over the last share `decay` of all `updates`,
    on a line or on half a cosine.
    """

    def factor(update: int) -> float:
        up = min(1.0, (update + 1) / (warm_up + 1))
        down = 1.0 if decay == 0 else min(1.0, (updates - update) / (decay * updates))
        down = max(0.0, down)
        if shape == "cosine":
            down = 0.5 - 0.5 * math.cos(math.pi * down)
        return up * (lowest + (1 - lowest) * down)

    return factor


class EMA:
    """A moving average of a network's parameters, in their dtype, as a network of its own that never trains.

    Early on the decay is at most (1 + n) / (10 + n), so that the average forgets where it started. It is moved by a
    `RoleUpdater`.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    def decay_at(self, update: int) -> float:
        """Of the update of this number, counted from 0."""
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def copy_buffers(self, network: nn.Module, where: Tensor) -> None:
        """Take over the network's buffers if `where` (), a tensor on the device, is true."""
        for average, value in zip(self.network.buffers(), network.buffers(), strict=True):
            average.copy_(torch.where(where, value, average))
