"""The processes of a run: one, or those that torchrun started, which share every batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among `size`. Each holds the whole networks and takes its share of every batch (data-parallel)."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes; one exchange per dtype."""
        if self.size == 1:
            return
        groups: dict[torch.dtype, list[Tensor]] = {}
        for t in tensors:
            groups.setdefault(t.dtype, []).append(t)
        for group in groups.values():
            flat = torch.cat([t.reshape(-1) for t in group])
            dist.all_reduce(flat)
            flat /= self.size
            for t, mean in zip(group, flat.split([t.numel() for t in group])):
                t.copy_(mean.view_as(t))

    def any(self, flag: bool) -> bool:
        """Whether any process says so: what one of them is told to do, all do in the same iteration."""
        if self.size == 1:
            return flag
        told = torch.tensor(int(flag), device=_exchange_device())
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world_of_environment(device: str | torch.device | None = None) -> Iterator[World]:
    """The processes that torchrun started, connected while this runs (NCCL on GPUs, gloo else); else one alone.

    device: what the run computes on; "cuda" becomes each process's own GPU (LOCAL_RANK).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    on_gpu = device is not None and torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _exchange_device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
