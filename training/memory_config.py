"""How a run spends memory: what can be chosen, and what is chosen where nothing is said."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TrainerConfig

_LORA = re.compile(r"lora:([1-9]\d*)")
_KNOWN = {
    "optimizer": ("auto", "float32", "8bit"),
    "checkpointing": ("auto", "none", "recompute", "blocks"),
    "frozen": ("auto", "float32", "bfloat16"),
    "decode": ("auto", "plain", "sliced", "checkpointed", "tiled"),
    "guidance": ("auto", "chunked", "batched"),
    "idle": ("auto", "device", "cpu"),
}

LARGE = 100_000_000
"""Parameters from which on "auto" saves memory. Below, a network and its optimiser take less than 2 GiB."""

HUGE = 2_000_000_000
"""Parameters from which on a student is taken to draw 1024 pixels, as SDXL, where one picture's decoder is large."""


@dataclass(frozen=True)
class MemoryConfig:
    """What a run gives for less memory. Gradients of a role are kept during its own turn alone, whatever is said here.

    "auto" is settled by the size of the student: saving from 100 M parameters on, plain below.

    Attributes:
        roles: "full", every role that trains a network of its own; or "lora:RANK", adapters of this rank in one frozen
            base, which is the teacher too (arXiv 2106.09685).
        optimizer: moments of AdamW as "float32", 8 bytes per parameter, or "8bit", about 2. "auto" keeps those of
            adapters in float32.
        checkpointing: what a pass with a gradient computes again in its backward pass instead of keeping it: "none";
            "recompute", norms and activation functions, by the fused ops (`fastdistill.nn.patch`); "blocks", every
            residual and transformer block. Passes without a gradient keep nothing anyway.
        frozen: dtype that networks which never train are held in. "bfloat16" needs `precision` bfloat16. Their own
            weights are rounded, in place.
        decode: of the VAE decoder in losses on pixels: "plain"; "sliced", one sample's loss and gradient after the
            other's, where the loss allows it, else as the next; "checkpointed", also block by block; "tiled", also tile
            by tile (diffusers' tiling, which blends overlapping tiles and changes the image a little).
        guidance: the teacher's guided passes "chunked", one after the other, or "batched", both at once.
        idle: where networks of the teacher's pipeline wait that a stage has no use for, such as text encoders, whose
            embeddings are computed once: on the "device" or the "cpu". For a picture or a validation they come back.
    """

    roles: str = "full"
    optimizer: str = "auto"
    checkpointing: str = "auto"
    frozen: str = "auto"
    decode: str = "auto"
    guidance: str = "auto"
    idle: str = "auto"

    def __post_init__(self) -> None:
        if self.roles != "full" and not _LORA.fullmatch(self.roles):
            raise ValueError(f"roles must be full or lora:RANK with a rank of 1 or more; got {self.roles}")
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)}")

    @property
    def rank(self) -> int | None:
        """Of the adapters; None for roles of full rank."""
        found = _LORA.fullmatch(self.roles)
        return None if found is None else int(found[1])


def settled(config: TrainerConfig, parameters: int) -> TrainerConfig:
    """The configuration without any "auto", for a student of so many parameters, its base counted.

    Raises:
        ValueError: settings that do not go together.
    """
    large, memory = parameters >= LARGE, config.memory
    precision = _or(config.precision, "bfloat16" if large else "float32")
    memory = replace(
        memory,
        optimizer=_or(memory.optimizer, "8bit" if large and memory.rank is None else "float32"),
        checkpointing=_or(memory.checkpointing, "blocks" if large else "none"),
        frozen=_or(memory.frozen, "bfloat16" if large and precision == "bfloat16" else "float32"),
        decode=_or(memory.decode, ("checkpointed" if parameters >= HUGE else "sliced") if large else "plain"),
        guidance=_or(memory.guidance, "chunked"),
        idle=_or(memory.idle, "cpu" if large else "device"),
    )
    if memory.frozen == "bfloat16" and precision != "bfloat16":
        raise ValueError(f"frozen bfloat16 needs precision bfloat16, in which such networks compute; got {precision}")
    return replace(config, precision=precision, memory=memory)


def chosen(config: TrainerConfig, parameters: int) -> dict[str, str]:
    """What `settled` puts for each "auto", by name."""
    given = {"precision": config.precision, **vars(config.memory)}
    found = settled(config, parameters)
    values = {"precision": found.precision, **vars(found.memory)}
    return {name: values[name] for name, value in given.items() if value == "auto"}


def _or(given: str, choice: str) -> str:
    return choice if given == "auto" else given
