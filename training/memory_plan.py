"""How much memory a run takes, said before it starts: figures by role and turn, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

GIB = 2**30
CONTEXT_BYTES = GIB
"""What a GPU holds beside tensors: the context of CUDA and its libraries, workspaces of convolutions and products."""

CARDS = {24: 22.5, 48: 45.0, 80: 79.2, 141: 140.4}
"""GiB that usual cards have for a program, by their GB: of those with a name the ones that show least."""


@dataclass(frozen=True)
class RoleMemory:
    """A network of a stage. Bytes are those of its own tensors: what several share is counted with the first.

    Attributes:
        role: its name; "base" is what roles of adapters share, "pipeline" what else of the teacher's pipeline is on the
            device.
        trained: whether it has a turn.
        parameters: numbers, not bytes.
        weight_bytes: parameters and buffers, in the dtype in which they are held.
        gradient_bytes: while its turn is; at other times it has none.
        optimizer_bytes: of AdamW's moments.
        average_bytes: of the student's moving average.
    """

    role: str
    trained: bool
    parameters: int
    weight_bytes: int
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    average_bytes: int = 0

    @property
    def resident_bytes(self) -> int:
        """What stays between turns."""
        return self.weight_bytes + self.optimizer_bytes + self.average_bytes


@dataclass(frozen=True)
class LiveTensor:
    """One that was there when memory was highest.

    Attributes:
        made_by: the op that made it; "resident" for what was there before.
    """

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    made_by: str


@dataclass(frozen=True)
class TurnMemory:
    """The highest point of a turn: of all tensors, those included that stay.

    Attributes:
        turn: what the turn is for, such as a role; "preparation" is what a method does before its first iteration.
        peak_bytes: resident, gradient and activation bytes together.
        gradient_bytes: of the gradients that were there by then.
        activation_bytes: all else that does not stay: activations, casts of weights, batches.
        largest: tensors at that point, where they were asked for.
    """

    turn: str
    peak_bytes: int
    gradient_bytes: int
    activation_bytes: int
    largest: tuple[LiveTensor, ...] = ()


@dataclass(frozen=True)
class StageMemory:
    """A stage of a run in its steady state: every role has had its turn before.

    Attributes:
        roles: that it holds.
        data_bytes: of samples, pairs and conditions held on the device.
        turns: in their order.
        chosen: what each setting left to "auto" became, with the reason.
    """

    stage: str
    roles: tuple[RoleMemory, ...]
    data_bytes: int
    turns: tuple[TurnMemory, ...]
    chosen: dict[str, tuple[str, str]]

    @property
    def resident_bytes(self) -> int:
        """What stays between turns."""
        return self.data_bytes + sum(role.resident_bytes for role in self.roles)

    @property
    def tensor_bytes(self) -> int:
        """At the highest."""
        return max([self.resident_bytes, *(turn.peak_bytes for turn in self.turns)])


@dataclass(frozen=True)
class MemoryPlan:
    """Of a whole run on one device.

    Attributes:
        method, architecture: their names.
        device: "cuda" or "cpu", which the plan is for: they differ in what autocast computes in 16 bits.
        batch_size, accumulation, resolution: samples of a micro-batch, micro-batches of an update, (height, width).
        processes: that share the run; the plan is of one of them.
    """

    method: str
    architecture: str
    device: str
    batch_size: int
    accumulation: int
    resolution: tuple[int, int]
    stages: tuple[StageMemory, ...]

    @property
    def tensor_bytes(self) -> int:
        """The most that tensors take at a time, in any stage."""
        return max(stage.tensor_bytes for stage in self.stages)

    @property
    def context_bytes(self) -> int:
        """Beside tensors: 1 GiB on a GPU."""
        return CONTEXT_BYTES if self.device == "cuda" else 0

    @property
    def peak_bytes(self) -> int:
        """What the run takes of the device."""
        return self.tensor_bytes + self.context_bytes

    @property
    def stage(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.tensor_bytes)

    @property
    def cards(self) -> dict[str, bool]:
        """Which of the usual cards are enough."""
        return {f"{gb} GB": self.peak_bytes <= gib * GIB for gb, gib in CARDS.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON: `peak_bytes`, `tensor_bytes`, `context_bytes`; `roles`, `turns` and `chosen` of the stage that needs
        most; `cards`, whether each fits; and all `stages`."""
        stages = [_stage(stage) for stage in self.stages]
        most = stages[self.stages.index(self.stage)]
        return {
            "method": self.method,
            "architecture": self.architecture,
            "device": self.device,
            "batch_size": self.batch_size,
            "accumulation": self.accumulation,
            "resolution": list(self.resolution),
            "peak_bytes": self.peak_bytes,
            "tensor_bytes": self.tensor_bytes,
            "context_bytes": self.context_bytes,
            **{name: most[name] for name in ("roles", "turns", "chosen")},
            "cards": self.cards,
            "stages": stages,
        }


def _stage(stage: StageMemory) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "tensor_bytes": stage.tensor_bytes,
        "resident_bytes": stage.resident_bytes,
        "data_bytes": stage.data_bytes,
        "roles": [asdict(role) for role in stage.roles],
        "turns": {turn.turn: _turn(turn) for turn in stage.turns},
        "chosen": {name: {"value": value, "why": why} for name, (value, why) in stage.chosen.items()},
    }


def _turn(turn: TurnMemory) -> dict[str, Any]:
    found = {name: value for name, value in asdict(turn).items() if name != "turn"}
    if not turn.largest:
        found.pop("largest")
    return found
