"""Which tiles serve a problem, from its shape and the device's number of multiprocessors.

Everything here is an estimate but the largest tiles: those are what compiles for sm_80, sm_90 and sm_100 without
spilling and within shared memory, which the ahead-of-time gate holds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

Slices = tuple[tuple[int, int], ...]  # (first, width)

SMALLEST_BLOCK = 16  # what the tensor cores take
MAX_SLICES = 3
MAX_SLICED = 256

# Keys that are held at once, and their elements. Beyond, the kernels over many keys serve.
MAX_SHORT_KEYS = 128
MAX_SHORT_ELEMENTS = 80 * 160
MAX_SHORT_BACKWARD_KEYS = 80
# With 77 keys a head of 160 spills whatever its steps, warps and slices are: 24 bytes per thread for sm_90 and 104 for
# sm_80 at best, with 16 queries, 8 warps and a head of 128 + 32.
MAX_SHORT_BACKWARD_HEAD = 128

# Wider heads are computed in two parts by two programs, each of which takes the whole q k^T.
MAX_UNDIVIDED_FORWARD = 256
MAX_UNDIVIDED_BACKWARD = 160
MAX_UNDIVIDED_UNALIGNED = 64  # in the backward, where addresses take registers

# What a program spends on the other side's tiles, in rows of its own: they are loaded whether it has 16 rows or 128.
ROWS_OF_OVERHEAD = 64
SMALLEST_SHARED_BLOCK = 32  # narrower blocks leave warps without rows of their own

# A split costs one more launch and a pass over the partial results: some tiles of work.
TILES_PER_SPLIT = 8


def slices(size: int) -> Slices:
    """`size` rounded up to a multiple of 16, as descending powers of two: 40 = 32 + 16, 77 -> 80 = 64 + 16,
    160 = 128 + 32. One power of two where that takes more than three, or where no known model has such a head.
    """
    rest = triton.cdiv(size, SMALLEST_BLOCK) * SMALLEST_BLOCK
    parts: list[tuple[int, int]] = []
    while rest:
        width = 1 << (rest.bit_length() - 1)
        parts.append((sum(w for _, w in parts), width))
        rest -= width
    return tuple(parts) if len(parts) <= MAX_SLICES and size <= MAX_SLICED else whole_slice(size)


def whole_slice(size: int) -> Slices:
    """One power of two."""
    return ((0, max(SMALLEST_BLOCK, triton.next_power_of_2(size))),)


def padded(parts: Slices) -> int:
    return sum(width for _, width in parts)


@dataclass(frozen=True)
class Problem:
    heads: int  # of all batches
    queries: int
    keys: int
    head_dim: int
    itemsize: int
    aligned: bool = True  # whether 16 bytes can be moved at once; if not, addresses fill registers


@dataclass(frozen=True)
class HeadParts:
    """The columns of the results that one program computes: `width` of them, the last part maybe fewer."""

    count: int
    width: int


def head_parts(head_dim: int, undivided: int) -> HeadParts:
    if head_dim <= undivided:
        return HeadParts(1, head_dim)
    return HeadParts(2, triton.cdiv(head_dim, 16) * 8)


def forward_parts(problem: Problem) -> HeadParts:
    return head_parts(problem.head_dim, MAX_UNDIVIDED_FORWARD)


def backward_parts(problem: Problem) -> HeadParts:
    return head_parts(problem.head_dim, MAX_UNDIVIDED_BACKWARD if problem.aligned else MAX_UNDIVIDED_UNALIGNED)


def short_forward(problem: Problem) -> bool:
    """Whether all keys are held at once. Not in float32, whose products hold both operands in registers and spill."""
    if problem.itemsize != 2 or not problem.aligned:
        return False
    elements = padded(slices(problem.keys)) * problem.head_dim
    return problem.keys <= MAX_SHORT_KEYS and elements <= MAX_SHORT_ELEMENTS


def short_backward(problem: Problem) -> bool:
    return (
        problem.itemsize == 2
        and problem.aligned
        and problem.keys <= MAX_SHORT_BACKWARD_KEYS
        and problem.head_dim <= MAX_SHORT_BACKWARD_HEAD
    )


def chunk(problem: Problem) -> int:
    """Columns of a wide head that the backward reads at a time."""
    return 128 // problem.itemsize


@dataclass(frozen=True)
class Tile:
    """block: rows that a program owns; step: rows of the other side that it takes at a time; splits: of the other side,
    `per_split` rows each, their results combined by another launch."""

    block: int
    step: int
    splits: int
    per_split: int
    num_warps: int
    num_stages: int


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; of an H200 for any other, `meta` and the interpreter's CPU among them."""
    return _of_gpu(device.index) if device.type == "cuda" else 132


@functools.cache
def _of_gpu(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def choose_block(rows: int, groups: int, largest: int, processors: int) -> int:
    """Rows per program: of the powers of two up to `largest` the one whose waves take the shortest.

    `groups` times the rows' blocks are the programs; a multiprocessor runs one after the other.
    """

    def time(block: int) -> tuple[int, int]:
        programs = groups * triton.cdiv(rows, block)
        return triton.cdiv(programs, processors) * (block + ROWS_OF_OVERHEAD), -block

    smallest = min(SMALLEST_SHARED_BLOCK, largest, max(SMALLEST_BLOCK, triton.next_power_of_2(rows)))
    candidates = [1 << e for e in range(4, 8) if smallest <= 1 << e <= largest]
    return min(candidates, key=time)


def choose_splits(rows: int, step: int, programs: int, processors: int) -> tuple[int, int]:
    """(splits, rows per split) of the side that a program walks over, so that every split has a step of its own."""
    steps = triton.cdiv(rows, step)
    wanted = max(1, min(processors // programs, steps // TILES_PER_SPLIT))
    per_split = triton.cdiv(steps, wanted) * step
    return triton.cdiv(rows, per_split), per_split


def forward_tile(problem: Problem, processors: int) -> Tile:
    """Own rows: queries; other side: keys."""
    largest, step = _forward_limits(problem)
    groups = problem.heads * forward_parts(problem).count
    block = choose_block(problem.queries, groups, largest, processors)
    programs = groups * triton.cdiv(problem.queries, block)
    splits, per_split = choose_splits(problem.keys, step, programs, processors)
    return Tile(block, step, splits, per_split, _forward_warps(block, problem), 2)


def short_forward_tile(problem: Problem, processors: int) -> Tile:
    """All keys at once: one step."""
    block = choose_block(problem.queries, problem.heads, 64, processors)
    return Tile(block, problem.keys, 1, problem.keys, _forward_warps(block, problem), 1)


def backward_tile(rows: int, others: int, problem: Problem, processors: int, split: bool) -> Tile:
    """Own rows: queries for their gradient, keys for that of k and v; `split` allows more than one split."""
    largest, step, num_warps = _backward_limits(problem)
    groups = problem.heads * backward_parts(problem).count
    block = choose_block(rows, groups, largest, processors)
    programs = groups * triton.cdiv(rows, block)
    splits, per_split = choose_splits(others, step, programs, processors) if split else (1, others)
    return Tile(block, step, splits, per_split, num_warps, 2)


def short_backward_tile(problem: Problem, processors: int) -> Tile:
    """Own rows: all keys; other side: queries, split over as many programs as there are multiprocessors."""
    step = 32 if problem.head_dim <= 64 else 16
    steps = triton.cdiv(problem.queries, step)
    wanted = max(1, min(processors // problem.heads, steps))
    per_split = triton.cdiv(steps, wanted) * step
    return Tile(problem.keys, step, triton.cdiv(problem.queries, per_split), per_split, 8, 1)


def _forward_limits(problem: Problem) -> tuple[int, int]:
    """(largest block, step)"""
    head_dim = problem.head_dim
    if problem.itemsize == 4:
        return (32, 32) if head_dim <= 160 else (32, 16)
    if not problem.aligned:
        return 32, 16
    if head_dim <= 128:
        return 128, 64
    if head_dim <= 160:
        return 128, 32
    return 64, 32 if head_dim <= MAX_SLICED or head_dim == 512 else 16


def _forward_warps(block: int, problem: Problem) -> int:
    width = padded(slices(problem.head_dim))
    return 8 if block * width * problem.itemsize > 64 * 64 * 2 else 4


def _backward_limits(problem: Problem) -> tuple[int, int, int]:
    """(largest block, step, warps)"""
    head_dim = problem.head_dim
    if problem.itemsize == 4:
        return (32, 32, 4) if head_dim <= 64 else (32, 16, 8)
    if not problem.aligned:
        return 32, 16, 8
    if head_dim <= 128:
        return 64, 32, 4 if head_dim <= 64 else 8
    return 64, 16, 8
