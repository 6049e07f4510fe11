"""The processes of a run: one, or those that torchrun started, which share every batch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdistill.ops.gradient_norm import is_dense

BUCKET = 64 * 2**20
"""Bytes that one exchange of gradients carries: tens of megabytes fill the wires, and small tensors go together."""


@dataclass(frozen=True)
class World:
    """This process among `size`, which share every batch: each takes its part of it (data-parallel)."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reports."""
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor], bucket: int = BUCKET) -> None:
        """Replace each tensor by its mean over all processes.

        Small ones go together, `bucket` bytes at a time and two exchanges under way; larger ones are averaged where
        they lie. So a set of gradients needs two buckets of memory beside itself.

        `DistributedDataParallel` would overlap the exchange with the backward pass, but expects one forward pass per
        backward pass: here a role is called several times, in parts, and without gradient before one.
        """
        if self.size == 1:
            return
        under_way: deque[_Exchange] = deque()
        for group in _buckets(tensors, bucket):
            under_way.append(_Exchange(group, self.size))
            if len(under_way) > 1:
                under_way.popleft().finish()
        for exchange in under_way:
            exchange.finish()

    def any(self, flag: bool) -> bool:
        """Whether any process says so: what one of them is told to do, all do in the same iteration."""
        if self.size == 1:
            return flag
        told = torch.tensor(int(flag), device=_exchange_device())
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told)

    def each(self, do: Callable[[], Any]) -> list[Any]:
        """What `do` returns in every process, by rank; an OSError in one of them is raised in all."""
        result, error = None, None
        try:
            result = do()
        except OSError as failure:
            error = failure
        said = self.gather((result, None if error is None else str(error)))
        for _, told in said:
            if told is not None:
                raise error or OSError(told)
        return [result for result, _ in said]

    def first(self, do: Callable[[], Any]) -> Any:
        """What `do` returns, done by the first process alone; an OSError that it raises is raised in all."""
        return self.each(lambda: do() if self.is_first else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """What each process says, by rank: any small object."""
        if self.size == 1:
            return [value]
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value)
        return said

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


class _Exchange:
    """The mean of some tensors of one dtype and device, over all processes, under way."""

    def __init__(self, tensors: list[Tensor], size: int) -> None:
        self._tensors, self._size = tensors, size
        self._in_place = len(tensors) == 1 and is_dense(tensors[0])
        # A dense tensor as it lies in memory, whatever the order of its dimensions: it is the same in all processes.
        self._flat = (
            tensors[0].as_strided((tensors[0].numel(),), (1,))
            if self._in_place
            else torch.cat([t.reshape(-1) for t in tensors])
        )
        self._work = dist.all_reduce(self._flat, async_op=True)

    def finish(self) -> None:
        self._work.wait()
        self._flat /= self._size
        if not self._in_place:
            for t, mean in zip(self._tensors, self._flat.split([t.numel() for t in self._tensors])):
                t.copy_(mean.view_as(t))


def _buckets(tensors: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device, of at most `size` bytes together, or a larger one alone."""
    filling: dict[tuple, list[Tensor]] = {}
    for t in tensors:
        if t.nbytes >= size:
            yield [t]
            continue
        kind = (t.dtype, t.device)
        group = filling.setdefault(kind, [])
        if sum(each.nbytes for each in group) + t.nbytes > size:
            yield group
            group = filling[kind] = []
        group.append(t)
    yield from filling.values()


def _exchange_device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
