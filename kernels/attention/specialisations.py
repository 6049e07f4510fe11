"""The compiled versions of the kernels that the ahead-of-time gate checks.

A version is decided by the head dimension, the tiles, the dtype, whether rows overhang, and which addresses and strides
allow 16-byte accesses. The probes below take each kernel to the shapes of diffusion models, to the largest tiles and to
unaligned memory. They go through the same plans as a call with data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..launch import Launch, Specialisation, unique_specialisations
from .backward import plan_backward
from .forward import plan_forward


@dataclass(frozen=True)
class Probe:
    """One forward and one backward call, on `meta` tensors in (B, N, H, D) memory order."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    aligned: bool = True  # else tensors start one element late, and so does each row after the one before

    def launches(self) -> list[Launch]:
        q, grad_o = self._rows(self.queries), self._rows(self.queries)
        k, v = self._rows(self.keys), self._rows(self.keys)
        forward, (o, lse) = plan_forward(q, k, v, 0.125)
        backward, _ = plan_backward(grad_o, q, k, v, o, lse, 0.125)
        return forward + backward

    def _rows(self, rows: int) -> torch.Tensor:
        late = 0 if self.aligned else 1
        memory = torch.empty(self.batch, rows, self.heads * self.head_dim + late, dtype=self.dtype, device="meta")
        return memory[..., late:].unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


def probes() -> Iterator[Probe]:
    # Stable Diffusion 1.5 at 512 pixels: its levels, each with itself and with 77 text tokens.
    for queries, head_dim in ((4096, 40), (1024, 80), (256, 160), (64, 160)):
        yield Probe(1, 8, queries, queries, head_dim)
        yield Probe(1, 8, queries, 77, head_dim)
    # Batches, where blocks are the largest: Stable Diffusion XL, training.
    for head_dim, dtype in ((40, torch.bfloat16), (64, torch.float16), (80, torch.bfloat16), (160, torch.bfloat16)):
        yield Probe(16, 8, 4096, 4096, head_dim, dtype)
        yield Probe(16, 8, 4096, 77, head_dim, dtype)
    # The VAE's one head; few queries and many keys, the other way round, and a ragged wide head.
    yield Probe(1, 1, 4096, 4096, 512)
    yield Probe(1, 1, 64, 4096, 64)
    yield Probe(1, 1, 4096, 257, 64)
    yield Probe(1, 1, 1000, 1001, 328, torch.float16)
    # The widest of each kind of tile.
    for head_dim in (128, 256):
        yield Probe(16, 8, 1024, 1023, head_dim)
    for keys, head_dim in ((128, 96), (112, 112), (80, 128)):
        yield Probe(16, 8, 1023, keys, head_dim)
    for head_dim in (64, 160, 512):
        yield Probe(4, 2, 1024, 1024, head_dim, torch.float32)
    # Nothing aligned.
    for keys in (197, 77):
        yield Probe(1, 3, 197, keys, 24, torch.float16, aligned=False)
        yield Probe(16, 3, 1024, keys, 160, torch.float16, aligned=False)
    yield Probe(16, 1, 1000, 1001, 512, torch.float16, aligned=False)


def specialisations() -> list[Specialisation]:
    """Every different version that the probes launch; needs neither a GPU nor the interpreter."""
    return unique_specialisations(launch for probe in probes() for launch in probe.launches())
