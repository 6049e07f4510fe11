"""What a distillation method says of itself: roles, turns, losses. The trainer does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .draws import Draws
from .pipelines import one_step_scheduler


@dataclass(frozen=True)
class Turn:
    """`role` is updated in every `every`-th iteration (TTUR, arXiv 1706.08500, in the counting of arXiv 2405.14867).

    asks_for: what `Method.losses` is asked for; the role unless given. So a role can have a second turn: a lazy
        penalty's optimiser step.
    """

    role: str
    every: int = 1
    asks_for: str = ""

    @property
    def kind(self) -> str:
        return self.asks_for or self.role


@dataclass(frozen=True)
class Step:
    """A micro-batch.

    Attributes:
        batch: what the data gave, on the device of the networks.
        draws: random numbers of this micro-batch and turn.
        memo: empty at first; the turns of one iteration see the same one. A sample made in the student's turn is kept
            here, detached, for the fake score's.
    """

    batch: Mapping[str, Any]
    draws: Draws
    memo: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Losses:
    """Of one turn.

    Attributes:
        terms: scalars, weighted; their sum is what the role descends, and each alone must give it a gradient.
        logs: further figures for the log, without gradient. Scalars on the device.
        then: computes the turn's other terms, which have no graph in common with these: it is called when these are
            differentiated and their graph is gone, so that the two never take memory together.
    """

    terms: dict[str, Tensor]
    logs: dict[str, Tensor] = field(default_factory=dict)
    then: Callable[[], Losses] | None = None

    def whole(self) -> Losses:
        """All terms at once."""
        if self.then is None:
            return self
        rest = self.then().whole()
        return Losses(self.terms | rest.terms, self.logs | rest.logs)


class Method(ABC):
    """Networks as roles, whose turn comes how often, and the loss terms of a turn. A new method is one new file.

    Attributes:
        name: as the command line and checkpoints know it.
        roles: every network, by name. Those with a turn train; the trainer freezes the others.
        turns: in the order in which they come within an iteration. The first one's role is the student, whose updates
            count, and whose average is delivered.
        start: the timestep at which the student's first step starts.
        decodes_by_sample: whether losses on pixels keep one sample's graph at a time, so that nothing of the decoder
            need be computed again to save memory.
    """

    name: str
    start: int
    decodes_by_sample: bool = False
    roles: dict[str, nn.Module]
    turns: tuple[Turn, ...]

    @abstractmethod
    def losses(self, role: str, step: Step) -> Losses:
        """The terms of `role`'s turn, or of `Turn.asks_for`. Only that role's parameters need a gradient meanwhile."""

    def probing(self) -> AbstractContextManager:
        """A context in which every term has a gradient: a fake score that is still the teacher's copy has none."""
        return nullcontext()

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must agree with, and what is written beside a student: JSON."""
        return {}

    def figures(self) -> dict[str, float]:
        """What was measured on the way, by name, written beside a student. A resumed run need not agree with it."""
        return {}

    def sampling(self) -> dict[str, Any]:
        """How the delivered student is sampled, JSON: steps, the first one's timestep, guidance scale."""
        return {"steps": 1, "timestep": self.start, "guidance_scale": 1.0}

    def scheduler(self, teacher_scheduler: Any) -> Any:
        """The diffusers scheduler that samples the delivered student so, in a pipeline called with these `sampling`."""
        return one_step_scheduler(teacher_scheduler, self.start)
