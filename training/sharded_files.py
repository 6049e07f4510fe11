"""Tensors of which every process holds a part, as files: each process writes its own, any number of them reads.

Through `torch.distributed.checkpoint`, in its safetensors storage, which pickles nothing: a file says of each tensor
where its part begins, and that is all the metadata there is.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .world import World


def write(folder: Path, tensors: Mapping[str, Tensor], world: World) -> list[Path]:
    """Write the parts of sharded tensors into a new folder; the files that are this process's. All processes call this.

    Raises:
        OSError: one process could not write, in all of them.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise _first_of(error) from error
    return sorted(folder.glob(f"shard-{world.rank + 1:05d}-*"))


def read(folder: Path, into: Mapping[str, Tensor], world: World) -> None:
    """Fill tensors, sharded or whole, with what `write` wrote, by any number of processes. All processes call this.

    Raises:
        OSError: one process could not read, in all of them.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process alone is meant
            dcp.load(dict(into), storage_reader=reader, no_dist=world.size == 1)
    except CheckpointException as error:
        raise _first_of(error) from error


def _first_of(error: BaseException) -> OSError:
    rank, (failure, _) = next(iter(error.failures.items()))
    return OSError(f"process {rank}: {failure}")


def empty(like: Tensor | None, shape: list[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU to read into, sharded as `like` is; whole without one."""
    if like is None:
        return torch.empty(shape, dtype=dtype)
    return torch.empty_like(like, dtype=dtype, device="cpu", requires_grad=False)
