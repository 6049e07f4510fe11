"""The compiled versions of the kernels that the ahead-of-time gate checks.

A version is decided by the tile, the dtypes, which strides are 1 and which addresses and sizes are multiples of 16.
The probes below take each kernel through every regime, layout and dtype, with and without alignment, at the tiles
that the real sites of the diffusion models use and at the largest ones. They go through the same plans as a call
with data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..launch import Launch, Specialisation, unique_specialisations
from .backward import plan_backward
from .configuration import DEFAULT, Configuration, configurations
from .forward import plan_forward


@dataclass(frozen=True)
class Probe:
    """One forward and one backward call, on `meta` tensors."""

    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = False
    grad_channels_last: bool | None = None  # None: as x
    parameters: torch.dtype | None = torch.float32
    silu: bool = True
    storage_offset: int = 0  # in elements: 1 makes every address and stride-derived offset unaligned

    def launches(self, configuration: Configuration = DEFAULT) -> list[Launch]:
        batch, channels = self.shape[:2]
        x = self._image(self.channels_last)
        grad_y = self._image(self.channels_last if self.grad_channels_last is None else self.grad_channels_last)
        weight = bias = add = None
        if self.parameters is not None:
            weight, bias = (torch.empty(channels, dtype=self.parameters, device="meta") for _ in range(2))
            add = torch.empty(batch, channels, dtype=self.parameters, device="meta")
        forward, (_, mean, rstd) = plan_forward(x, self.groups, weight, bias, add, 1e-5, self.silu, configuration)
        backward, _ = plan_backward(grad_y, x, self.groups, weight, bias, add, mean, rstd, self.silu, configuration)
        return forward + backward

    def _image(self, channels_last: bool) -> torch.Tensor:
        batch, channels, *spatial = self.shape
        memory = torch.empty(math.prod(self.shape) + self.storage_offset, dtype=self.dtype, device="meta")
        memory = memory[self.storage_offset :]
        if channels_last:
            return memory.view(batch, *spatial, channels).movedim(-1, 1)
        return memory.view(self.shape)


def probes() -> Iterator[Probe]:
    for channels_last in (False, True):
        # Stable Diffusion's UNet from its lowest level up: whole both ways, whole forward at its largest, split.
        yield Probe((1, 1280, 8, 8), 32, torch.bfloat16, channels_last)
        yield Probe((1, 1280, 16, 16), 32, torch.float32, channels_last)
        yield Probe((1, 320, 64, 64), 32, torch.bfloat16, channels_last, grad_channels_last=not channels_last)
        # Its VAE decoder.
        yield Probe((2, 128, 512, 512), 32, torch.float16, channels_last, parameters=torch.float16)
        # Nothing aligned.
        yield Probe((3, 33, 7, 9), 11, torch.float16, channels_last, parameters=None, silu=False, storage_offset=1)
        yield Probe((1, 66, 65, 67), 2, torch.bfloat16, channels_last, storage_offset=1)
    yield Probe((16, 32, 16, 16), 8, torch.float32, channels_last=True)  # several groups per tile
    yield Probe((8, 640), 32, torch.float32)  # one value per channel
    yield Probe((1, 2560, 40), 1, torch.float32)  # many channels, few pixels
    yield Probe((1, 2, 1_000_003), 2, torch.float32)  # fewer channels than a tile has
    yield Probe((1, 64, 6000, 6000), 32, torch.bfloat16)  # strides beyond 32 bits


def specialisations() -> list[Specialisation]:
    """Every different version that the probes launch on any device of the table; needs neither a GPU nor the
    interpreter."""
    return unique_specialisations(
        launch for entry in configurations() for probe in probes() for launch in probe.launches(entry)
    )
