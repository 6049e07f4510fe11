"""Which tile serves a problem. The choice depends on shapes alone: the same call sums in the same order on every GPU.

A tile is rows times columns. A row's columns are held in two parts, a power of two (`head`) and the smallest one that
covers the rest (`tail`, 0 for none): 320 = 256 + 64, 640 = 512 + 128, 1280 = 1024 + 256 without a wasted lane, where a
single power of two wastes 3 of 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

# Columns of a row that stays in registers, 16 warps at most. The backward keeps four values per column (xhat, w dy and
# two sums), the forward one; 8192 unaligned float32 columns spill up to 136 bytes per thread in the backward. Longer
# rows are read twice, in blocks.
MAX_WHOLE_FORWARD = 16384
MAX_WHOLE_BACKWARD = 6144
BLOCK = 4096  # columns of a block of a longer row
BLOCK_WARPS = 8

TILE_ELEMENTS = 2048  # short rows share a program up to so many
ELEMENTS_PER_WARP = 512  # 16 per thread: enough loads in flight without making a small tile wait for itself

# Programs of a backward with sums over the rows walk the rows in turns, so many warps on the device in all: about 16
# on each of 132 multiprocessors. Each leaves one partial sum per column.
WARPS_PER_WAVE = 2048

SUM_BLOCK = {"BLOCK_P": 64, "BLOCK_C": 16}  # partial sums, columns
SUM_WARPS = 4


def row_stride(t: torch.Tensor) -> int:
    """The stride from row to row of (..., D), whose rows one stride is known to walk."""
    strides = [stride for size, stride in zip(t.shape[:-1], t.stride()[:-1]) if size > 1]
    return strides[-1] if strides else t.shape[-1]


@dataclass(frozen=True)
class Tile:
    rows: int
    head: int
    tail: int
    num_warps: int

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_R": self.rows, "HEAD": self.head, "TAIL": self.tail}


def choose_tile(rows: int, columns: int, max_columns: int) -> Tile | None:
    """The tile of whole rows; None where a row does not fit."""
    head, tail = triton.next_power_of_2(columns), 0
    # Two parts where a quarter of a single one would be empty.
    if 4 * columns <= 3 * head:
        head //= 2
        tail = triton.next_power_of_2(columns - head)
    if head + tail > max_columns:
        return None
    shared = min(max(1, TILE_ELEMENTS // (head + tail)), triton.next_power_of_2(rows))
    block_r = triton.next_power_of_2(shared + 1) // 2  # the largest power of two within
    num_warps = triton.next_power_of_2(triton.cdiv(block_r * (head + tail), ELEMENTS_PER_WARP))
    return Tile(block_r, head, tail, min(16, num_warps))


def choose_programs(tiles: int, num_warps: int) -> int:
    """Programs that share `tiles` tiles of rows, each leaving one partial sum per column."""
    return min(tiles, WARPS_PER_WAVE // num_warps)
