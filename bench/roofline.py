"""The least time a call can take: its bytes at the device's copy bandwidth or its operations at the matmul rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .devices import DeviceSpec


@dataclass(frozen=True)
class Cost:
    """What every implementation must do.

    Attributes:
        bytes: moved between memory and chip if each input is read once and each result written once.
        flops: additions, multiplications, divisions and exponentials, counted one each; approximate.
    """

    bytes: int
    flops: int


@dataclass(frozen=True)
class Limit:
    """A cost, the time below which a device cannot do it, and which of the two decides ("memory" or "arithmetic")."""

    bytes: int
    flops: int
    us: float
    bound: str

    def gigabytes_per_second(self, us: float) -> float:
        """Reached by a call of `us` microseconds."""
        return self.bytes / us / 1e3

    def teraflops(self, us: float) -> float:
        """Reached by a call of `us` microseconds."""
        return self.flops / us / 1e6

    def percent(self, us: float) -> float:
        """Of the limit reached by a call of `us` microseconds. Above 100 where the data stays in a cache."""
        return 100 * self.us / us


def limit(cost: Cost, dtype: torch.dtype, device: DeviceSpec) -> Limit:
    """`max(bytes / bandwidth, flops / matmul rate)`, in microseconds."""
    memory = cost.bytes / device.copy_gb_s / 1e3
    arithmetic = cost.flops / device.rate(dtype) / 1e6
    bound = "memory" if memory >= arithmetic else "arithmetic"
    return Limit(cost.bytes, cost.flops, max(memory, arithmetic), bound)


def pointwise(mode: str, dtype: torch.dtype, values: Mapping[str, int], flops: Mapping[str, int]) -> Cost:
    """The cost of a mode from those of its passes.

    Args:
        mode: "forward", "backward", or "full" for one after the other.
        values: moved in "forward" and in "backward".
        flops: likewise.
    """
    passes = ("forward", "backward") if mode == "full" else (mode,)
    return Cost(sum(values[each] for each in passes) * dtype.itemsize, sum(flops[each] for each in passes))
