"""How implementations of an op divide a call among a device's multiprocessors: counted, nothing is run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .devices import DeviceSpec
from .roofline import Cost, limit


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        tile: what a block takes at a time, in words.
        blocks: given to the device.
        cost: its operations, padding included; its bytes if each tensor that it takes is moved once.
    """

    tile: str
    blocks: int
    cost: Cost


@dataclass(frozen=True)
class Tiling:
    """The kernels of one implementation, in order."""

    by: str
    kernels: tuple[Kernel, ...]

    @property
    def cost(self) -> Cost:
        return Cost(sum(k.cost.bytes for k in self.kernels), sum(k.cost.flops for k in self.kernels))

    @property
    def tiles(self) -> str:
        return " + ".join(kernel.tile for kernel in self.kernels)

    @property
    def blocks(self) -> str:
        return " + ".join(str(kernel.blocks) for kernel in self.kernels)

    def waves(self, multiprocessors: int) -> str:
        """Per kernel, with one block on a multiprocessor at a time."""
        return " + ".join(f"{kernel.blocks / multiprocessors:.2f}" for kernel in self.kernels)

    def us(self, dtype: torch.dtype, device: DeviceSpec) -> float:
        """The least time of its kernels, one after the other, on a device that each of them fills."""
        return sum(limit(kernel.cost, dtype, device).us for kernel in self.kernels)
