"""What a run tells of itself: while it runs, of its validations, and at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from .method import Method


@dataclass(frozen=True)
class TrainingProgress:
    """What a callback sees.

    Attributes:
        stage: the name of the training that is running; a run may have several.
        update, total: student updates done and planned.
        seconds: of training so far, those before a resume included.
        losses: the terms and logs of the last turns.
        updates, skipped: optimiser steps per role, taken and left out: a gradient that is not finite, a loss that
            explodes.
        learning_rates, gradient_norms: per role; of the next update, and of the last one before clipping.
        validation, validated: the figures of the last validation, and the update after which they were taken; empty
            and None before the first.
        best: the update after which the first figure was lowest, None before the first validation.
        peak_bytes: the most memory that tensors had on the device so far; None on a CPU, which does not count it.
        student: the network that would be delivered now, in evaluation mode. Look, but do not change it. One that is
            sharded is whole for as long as the callback runs, so that one process can call it alone.
        method: that is running, to ask how its student is sampled.
    """

    stage: str
    update: int
    total: int
    seconds: float
    losses: dict[str, float]
    updates: dict[str, int]
    skipped: dict[str, int]
    student: nn.Module
    learning_rates: dict[str, float] = field(default_factory=dict)
    gradient_norms: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    validated: int | None = None
    best: int | None = None
    peak_bytes: int | None = None
    method: Method | None = None


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        student: the network to deliver, in evaluation mode.
        updates: optimiser steps per role.
        seconds: of training.
        losses: of the last turns.
        ended: "finished", "callback", or the name of the signal that ended it.
        validation: the figures of the last validation.
        best: the update whose validation had the lowest first figure, which the student is of if
            `TrainerConfig.deliver` is "best".
    """

    student: nn.Module
    updates: dict[str, int]
    seconds: float
    losses: dict[str, float] = field(default_factory=dict)
    ended: str = "finished"
    validation: dict[str, float] = field(default_factory=dict)
    best: int | None = None


@dataclass
class Validation:
    """What validating has found so far.

    Attributes:
        figures, update: of the last one, and the student's update that it followed.
        best, best_iteration, best_value: where the first figure was lowest.
        average: the averaged student of that time, on the CPU, where it is to be delivered.
    """

    figures: dict[str, float] = field(default_factory=dict)
    update: int | None = None
    best: int | None = None
    best_iteration: int | None = None
    best_value: float = math.inf
    average: dict[str, Tensor] | None = None

    def add(self, update: int, iteration: int, figures: dict[str, float], kept: nn.Module | None) -> None:
        self.figures, self.update = figures, update
        value = next(iter(figures.values()), math.nan)
        if value < self.best_value:
            self.best, self.best_iteration, self.best_value = update, iteration, value
            if kept is not None:
                self.average = {name: t.detach().to("cpu", copy=True) for name, t in kept.state_dict().items()}
