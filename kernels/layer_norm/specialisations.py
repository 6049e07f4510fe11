"""The compiled versions of the kernels that the ahead-of-time gate checks.

A version is decided by the tile, the dtypes, which strides are 1 and which addresses and sizes are multiples of 16. The
probes below take each kernel to the widths that diffusion models use, with and without alignment, and to the largest
tiles. They go through the same plans as a call with data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..launch import Launch, Specialisation, unique_specialisations
from .backward import plan_backward
from .forward import plan_forward


@dataclass(frozen=True)
class Probe:
    """One forward and one backward call, on `meta` tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    residual: bool = True
    parameters: torch.dtype | None = torch.float32
    storage_offset: int = 0  # in elements: 1 makes every address unaligned

    def launches(self) -> list[Launch]:
        x = self._tensor()
        residual = self._tensor() if self.residual else None
        weight = bias = None
        if self.parameters is not None:
            weight, bias = (torch.empty(self.shape[-1], dtype=self.parameters, device="meta") for _ in range(2))
        forward, (_, s, mean, rstd) = plan_forward(x, residual, weight, bias, 1e-5)
        s = s if self.residual else x
        grad_s = self._tensor() if self.residual else None
        backward, _ = plan_backward(self._tensor(), grad_s, s, weight, mean, rstd, self.parameters is not None)
        return forward + backward

    def _tensor(self) -> torch.Tensor:
        memory = torch.empty(math.prod(self.shape) + self.storage_offset, dtype=self.dtype, device="meta")
        return memory[self.storage_offset :].view(self.shape)


def probes() -> Iterator[Probe]:
    for columns in (320, 640, 1280, 2560, 5120):
        yield Probe((2, 1024, columns), torch.bfloat16)
    for columns in (320, 1280):
        yield Probe((2, 1024, columns), torch.float32, residual=False)
    yield Probe((2, 77, 768), torch.float16, parameters=torch.float16)
    yield Probe((2, 1024, 640), torch.float16, parameters=None)
    # The largest rows that stay in registers, and longer ones.
    for dtype in (torch.bfloat16, torch.float32):
        yield Probe((64, 6140), dtype)
        yield Probe((64, 16384), dtype)
    yield Probe((64, 20000), torch.bfloat16)
    # Nothing aligned.
    yield Probe((3, 33, 17), torch.float16, storage_offset=1)
    yield Probe((3, 33, 641), torch.bfloat16, storage_offset=1)
    yield Probe((7, 6001), torch.float32, storage_offset=1)
    yield Probe((7, 9001), torch.float32, storage_offset=1)
    yield Probe((5, 1), torch.float32)
    yield Probe((3, 1_000_003), torch.bfloat16)
    yield Probe((300_000, 9000), torch.bfloat16)  # offsets beyond 32 bits


def specialisations() -> list[Specialisation]:
    """Every different version that the probes launch; needs neither a GPU nor the interpreter."""
    return unique_specialisations(launch for probe in probes() for launch in probe.launches())
