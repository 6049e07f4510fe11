"""Why a setting of memory that was left to "auto" became what it is."""

from __future__ import annotations

from .config import TrainerConfig
from .memory_config import LARGE, chosen

_SMALL = f"a student below {LARGE // 1_000_000} M parameters has no need"

_WHY = {
    ("precision", "bfloat16"): "networks compute in 16 bits; what trains stays float32",
    ("optimizer", "8bit"): "moments of full-rank roles take 2 bytes per parameter in place of 8",
    ("optimizer", "float32"): "moments of adapters are small",
    ("checkpointing", "blocks"): "passes with a gradient keep the inputs of blocks alone",
    ("frozen", "bfloat16"): "networks that never train take 2 bytes per parameter in place of 4",
    ("frozen", "float32"): "networks compute in float32",
    ("decode", "sliced"): "losses on pixels are taken image by image, and no two images are decoded at a time",
    (
        "decode",
        "checkpointed",
    ): "losses on pixels are taken image by image, and their decoder keeps inputs of blocks",
    ("guidance", "chunked"): "a guided pass takes no more than one without guidance",
    ("idle", "cpu"): "what a stage has no use for waits on the host; its embeddings and latents are computed once",
}


def choices(config: TrainerConfig, parameters: int) -> dict[str, tuple[str, str]]:
    """(value, reason) of every "auto", for a student of so many parameters."""
    found = chosen(config, parameters)
    small = parameters < LARGE
    return {name: (value, _reason(name, value, small)) for name, value in found.items()}


def _reason(name: str, value: str, small: bool) -> str:
    if small and name != "guidance":
        return _SMALL
    return _WHY.get((name, value), "the cheapest that changes nothing")
