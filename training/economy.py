"""What a trainer does to a method's networks for less memory, as `MemoryConfig` says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from fastdistill.nn import patch, unpatch

from .adapters import AdapterRole, SharedBase
from .memory_config import MemoryConfig
from .method import Method

# What judges or draws pixels stays float32: it is small, and bfloat16 has 8 bits for a pixel's 8.
_PIXELS = ("decoder", "lpips")


def size_of(network: nn.Module) -> int:
    """How many parameters a network has, with those of the base that it shares."""
    return sum(p.numel() for p in (*network.parameters(), *shared_by(network)))


def shared_by(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of the bases that a network stands on."""
    return [p for base in bases(network) for p in base.base_parameters()]


def bases(network: nn.Module) -> list[SharedBase]:
    """The shared bases that roles within a network stand on, each once."""
    found = {id(part.base): part.base for part in network.modules() if isinstance(part, AdapterRole)}
    return list(found.values())


def economize(method: Method, memory: MemoryConfig, trained: Iterable[str]) -> None:
    """Change a method's networks in place, before anything refers to their parameters.

    Args:
        memory: settled, without any "auto".
        trained: the roles that train.
    """
    trained = set(trained)
    for role, network in method.roles.items():
        if memory.frozen == "bfloat16" and role not in _PIXELS:
            for base in bases(network):
                base.cast(torch.bfloat16)
            if role not in trained and not isinstance(network, AdapterRole):
                _cast(network, torch.bfloat16)
        if role in _PIXELS:
            sliced = memory.decode == "sliced" and method.decodes_by_sample
            if memory.decode != "plain" and not sliced:
                _checkpoint(network)
            if memory.decode == "tiled" and hasattr(network, "enable_tiling"):
                network.enable_tiling()
        elif memory.checkpointing == "blocks":
            _checkpoint(network)
        elif memory.checkpointing == "recompute":
            patch(network, recompute=True)
            for base in bases(network):
                patch(base.network, recompute=True)


def restore(method: Method) -> None:
    """Undo what changed how networks compute; dtypes stay."""
    for network in method.roles.values():
        unpatch(network)
        for part, base in _checkpointable(network):
            part.disable_gradient_checkpointing()
            if base is not None:
                unpatch(part)
        if hasattr(network, "disable_tiling"):
            network.disable_tiling()


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    # Not Module.to: diffusers' own warns of parts that it keeps in float32, here of none.
    nn.Module.to(network, dtype)


def _checkpoint(network: nn.Module) -> None:
    for part, base in _checkpointable(network):
        if base is None:
            part.enable_gradient_checkpointing()
        else:
            part.enable_gradient_checkpointing(base.checkpoint)


def _checkpointable(network: nn.Module) -> Iterator[tuple[nn.Module, SharedBase | None]]:
    """Diffusers' networks within a network, and the shared base that each one is."""
    for part in network.modules():
        if getattr(part, "_supports_gradient_checkpointing", False) and not isinstance(part, AdapterRole):
            yield part, None
    for base in bases(network):
        if getattr(base.network, "_supports_gradient_checkpointing", False):
            yield base.network, base
