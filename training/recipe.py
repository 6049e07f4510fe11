"""What a run consists of: a setup, and the stages that a method's configuration makes of it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import nn

from .condition import Condition
from .config import RoleConfig, TrainerConfig
from .data import Data, LatentData
from .method import Method
from .pairs.memory import Pairs
from .teacher import Teacher


@dataclass(frozen=True)
class Setup:
    """What every method is given.

    Attributes:
        teacher: whom to distil.
        prompts: what the student shall be able to draw.
        conditions: the same, encoded.
        images: real samples with captions; None where the user gave none.
        pairs: that were made before, or their folder; None: a method that needs pairs makes them.
        work: folder for what a method makes on the way, pairs for example; None keeps that in memory.
    """

    teacher: Teacher
    prompts: tuple[str, ...]
    conditions: Condition
    images: LatentData | Data | None = None
    pairs: Path | Pairs | None = None
    work: Path | None = None

    def needed_images(self, method: str) -> LatentData | Data:
        """The images, or a ValueError that says who needs them."""
        if self.images is None:
            raise ValueError(f"images: {method} trains on real images, none were given")
        return self.images


@dataclass(frozen=True)
class Stage:
    """One training: its networks, its data, its settings. A checkpoint folder is named after it.

    is_last: what it delivers is the student; the stages before prepare for it.
    """

    name: str
    method: Method
    data: Data
    trainer: TrainerConfig
    roles: dict[str, RoleConfig]
    is_last: bool = True


class MethodConfig(Protocol):
    """The configuration of a method: a frozen dataclass that knows its stages.

    It has a field `trainer` (`TrainerConfig`) and one `RoleConfig` per role that trains, named as the role.
    """

    method: ClassVar[str]
    trainer: TrainerConfig

    def stages(self, setup: Setup) -> Generator[Stage, nn.Module, Any]:
        """Yields one stage after the other and is sent what each delivers; the last one's is the student."""


def settings_of(config: Any) -> dict[str, Any]:
    """A configuration without its trainers and optimisers, which each stage has of its own; as nested dictionaries."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {
        name: settings_of(value) if is_dataclass(value) else value
        for name, value in values.items()
        if not isinstance(value, (TrainerConfig, RoleConfig))
    }
