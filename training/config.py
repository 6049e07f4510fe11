"""What a run depends on beside its method: frozen, checked when made, every field with its unit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .memory_config import MemoryConfig

PRECISIONS = ("auto", "float32", "bfloat16")
SHARDINGS = ("none", "full")
DELIVERED = ("last", "best")
DECAY_SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class TrainerConfig:
    """Of the loop.

    Attributes:
        updates: of the student; one that is left out for a gradient that is not finite counts as tried.
        batch_size: samples per micro-batch.
        accumulation: micro-batches per update.
        ema_decay: per student update, of the average that is delivered; 0 delivers the weights themselves.
        precision: "float32", or "bfloat16" for networks under autocast; weights that train, optimisers and losses stay
            float32. "auto" is settled as in `memory`.
        memory: what is given for less of it.
        sharding: under torchrun: "none", every process holds the whole networks (DDP); "full", networks that train,
            their optimiser states and averages, and teachers are split over the processes (FSDP2). One process holds
            everything, whatever is said here.
        seed: of everything random. The same seed gives the same bytes on the same machine and number of threads.
        report_every: student updates between two calls of the callback.
        checkpoint_every: student updates between two checkpoints; 0 for one at the end alone.
        keep_checkpoints: how many of the newest are kept.
        most_skipped: updates that may be left out, per role, before the run is stopped.
        explosion: an update is left out if the size of its loss is more than this many times the running average of
            the role's losses (an average below 1 counts as 1); 0 leaves out only what is not finite.
        validate_every: student updates between two validations, where a function for them is given; 0 for one at the
            end alone.
        deliver: "last", or "best" for the average as it was at the validation whose first figure was lowest.
    """

    updates: int = 300
    batch_size: int = 64
    accumulation: int = 1
    ema_decay: float = 0.98
    precision: str = "auto"
    memory: MemoryConfig = MemoryConfig()
    sharding: str = "none"
    seed: int = 0
    report_every: int = 10
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    most_skipped: int = 10
    explosion: float = 30.0
    validate_every: int = 0
    deliver: str = "last"

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "accumulation", "report_every", "keep_checkpoints"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("checkpoint_every", "most_skipped", "explosion", "validate_every"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        require("ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "in [0, 1)")
        require("precision", self.precision, self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        require("sharding", self.sharding, self.sharding in SHARDINGS, f"one of {', '.join(SHARDINGS)}")
        if self.sharding == "full" and self.memory.rank is not None:
            raise ValueError(
                "sharding full splits networks that train as a whole; adapters of one base (memory.roles "
                f"{self.memory.roles}) stay whole in every process: needed sharding none"
            )
        require("deliver", self.deliver, self.deliver in DELIVERED, f"one of {', '.join(DELIVERED)}")


@dataclass(frozen=True)
class RoleConfig:
    """Of one role's AdamW.

    Attributes:
        learning_rate: its highest, after the warm-up.
        beta1, beta2, weight_decay: of AdamW.
        warm_up: updates of this role over which its learning rate rises from 0.
        decay: share of the run, at its end, over which its learning rate falls; 0 keeps it constant, 1 with
            `decay_shape="cosine"` is the usual cosine schedule.
        decay_shape: "linear" or "cosine".
        lowest: what the learning rate falls to, as a share of its highest.
        max_grad_norm: gradients are clipped to this global norm.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    warm_up: int = 0
    decay: float = 0.0
    decay_shape: str = "linear"
    lowest: float = 0.0
    max_grad_norm: float = 10.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm"):
            require(name, getattr(self, name), getattr(self, name) > 0, "more than 0")
        for name in ("weight_decay", "warm_up"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("beta1", "beta2"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("decay", "lowest"):
            require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "in [0, 1]")
        shapes = ", ".join(DECAY_SHAPES)
        require("decay_shape", self.decay_shape, self.decay_shape in DECAY_SHAPES, f"one of {shapes}")


def require(name: str, value: Any, holds: bool, needed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {needed}; got {value}")


def role_configs(config: Any) -> dict[str, RoleConfig]:
    """The fields of a method's configuration that are `RoleConfig`s, by the names of the roles."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: value for name, value in values.items() if isinstance(value, RoleConfig)}
