"""Parameters of which each process holds a part (DTensor, as FSDP2's `fully_shard` makes them)."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch

from fastdistill.ops.gradient_norm import gradient_norm


def is_sharded(t: torch.Tensor) -> bool:
    # Where there is one its module was imported; to import it here would take half as long as torch itself.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, without autograd, in the same memory; a plain tensor as it is."""
    if not is_sharded(t):
        return t
    with torch.no_grad():
        return t.to_local()


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether every process holds the same part of both; two plain tensors are alike."""
    if not is_sharded(a) or not is_sharded(b):
        return is_sharded(a) == is_sharded(b)
    return a.device_mesh == b.device_mesh and a.placements == b.placements


def as_sharded(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`value`, which every process holds whole or sharded as it may be, sharded (or whole) as `like`.

    From sharded to whole is an exchange, which all processes take part in.
    """
    if alike(value, like):
        return value
    if is_sharded(value):
        value = value.full_tensor()
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole: each takes its own part, and nothing is sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_gradient_norm(grads: Iterable[torch.Tensor], backend: str | None = None) -> torch.Tensor:
    """`gradient_norm` over all processes' parts, the same () in every process, which all take part in."""
    parts: dict[tuple, list[torch.Tensor]] = {}
    for g in grads:
        parts.setdefault(_sharding(g), []).append(local(g))
    if list(parts) == [()]:
        return gradient_norm(parts[()], backend=backend)
    squares = []
    for sharding, tensors in parts.items():
        square = gradient_norm(tensors, backend=backend).square()
        for mesh, dimension in sharding:
            torch.distributed.all_reduce(square, group=mesh.get_group(dimension))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def _sharding(t: torch.Tensor) -> tuple:
    """The dimensions of its mesh over which a tensor's parts lie."""
    if not is_sharded(t):
        return ()
    return tuple((t.device_mesh, i) for i, placement in enumerate(t.placements) if placement.is_shard())
