"""Which regime serves a problem, and with which tiles.

The choice depends on shapes, strides and the device's entry in configuration.py. A tile is always (channels, pixels).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from .configuration import Configuration

SECTOR_CHANNELS = 16  # a 32-byte sector of a 16-bit tensor
MAX_GROUPS_PER_TILE = 16  # bounds the (channels, groups) table of device.group_totals


def ncs_strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Strides of a tensor (N, C, *spatial) read as (N, C, S). Its spatial dimensions are known to collapse into one."""
    spatial = [stride for size, stride in zip(tensor.shape[2:], tensor.stride()[2:]) if size > 1]
    return tensor.stride(0), tensor.stride(1), spatial[-1] if spatial else 1


@dataclass(frozen=True)
class Problem:
    """x read as (N, C, S), S being the pixels of an image, with G groups of channels."""

    batch: int
    channels: int
    pixels: int
    groups: int
    channels_last: bool

    @classmethod
    def of(cls, x: torch.Tensor, num_groups: int) -> Problem:
        _, stride_c, stride_s = ncs_strides(x)
        batch, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        contiguous = stride_s == 1 and (channels == 1 or stride_c == pixels)
        return cls(batch, channels, pixels, num_groups, channels_last=not contiguous)

    @property
    def channels_per_group(self) -> int:
        return self.channels // self.groups

    @property
    def elements(self) -> int:
        """Elements that share one mean."""
        return self.channels_per_group * self.pixels

    def arguments(self) -> dict[str, int | float]:
        """The sizes as kernel arguments; a count that only divides is a float32, exact to its rounding."""
        return {
            "batch": self.batch,
            "channels": self.channels,
            "pixels": self.pixels,
            "groups": self.groups,
            "channels_per_group": self.channels_per_group,
            "elements": float(self.elements),
        }


@dataclass(frozen=True)
class WholeTile:
    """Whole groups with all their pixels: a program needs nothing from the others and reads x once."""

    groups: int
    channels: int
    block_c: int
    block_s: int
    block_g: int
    num_warps: int

    @property
    def channel_unit(self) -> int:
        """Compiled in as a factor of the tile's first channel, so that Triton can prove its alignment (10 x 8, 40 x
        1)."""
        return math.gcd(SECTOR_CHANNELS, self.channels)


@dataclass(frozen=True)
class SplitTile:
    """Any channels and a run of pixels; a program that accumulates walks `tiles_per_program` of them along the
    pixels."""

    block_c: int
    block_s: int
    channel_tiles: int
    pixel_tiles: int
    tiles_per_program: int
    num_warps: int

    @property
    def pixels_per_split(self) -> int:
        return self.tiles_per_program * self.block_s

    @property
    def splits(self) -> int:
        return triton.cdiv(self.pixel_tiles, self.tiles_per_program)

    def combine_blocks(self, channels_per_group: int, configuration: Configuration) -> dict[str, int]:
        """Splits and channels that a combine kernel takes per step.

        Two shapes, and so two versions, serve every problem. Groups of few channels have many splits, and each step is
        one wait for memory.
        """
        block_c = 4 if channels_per_group <= 4 else 16
        return {"BLOCK_K": configuration.combine_elements // block_c, "BLOCK_C": block_c}

    def arguments(self) -> dict[str, int]:
        return {
            "channel_tiles": self.channel_tiles,
            "pixel_tiles": self.pixel_tiles,
            "pixels_per_split": self.pixels_per_split,
            "splits": self.splits,
        }


def choose_whole_tile(problem: Problem, max_elements: int, configuration: Configuration) -> WholeTile | None:
    """The tile of the whole regime; None when no group fits into `max_elements`, or only with rows too short to be read
    well."""
    per_group = problem.channels_per_group
    block_s = triton.next_power_of_2(problem.pixels)
    if problem.channels_last:
        # Rows of whole 32-byte sectors: lcm(16, C/G) channels. They get shorter only if the tile is too large
        # otherwise.
        groups = math.lcm(SECTOR_CHANNELS, per_group) // per_group
    else:
        # A group is one run of memory. Tiny ones share a program, so that each thread of its warp has some to do.
        groups = max(1, 512 // problem.elements)
    groups = min(groups, problem.groups, MAX_GROUPS_PER_TILE)
    while groups > 1 and triton.next_power_of_2(groups * per_group) * block_s > max_elements:
        groups //= 2
    channels = groups * per_group
    elements = triton.next_power_of_2(channels) * block_s
    half_a_sector = min(SECTOR_CHANNELS // 2, problem.channels)
    if elements > max_elements or (problem.channels_last and channels < half_a_sector):
        return None
    block_c, block_g = triton.next_power_of_2(channels), triton.next_power_of_2(groups)
    num_warps = min(16, max(1, max(elements, block_c * block_g) // (32 * configuration.whole_elements_per_thread)))
    return WholeTile(groups, channels, block_c, block_s, block_g, num_warps)


def choose_split_tile(
    problem: Problem, elements_per_thread: int, configuration: Configuration, mixed_layouts: bool = False
) -> SplitTile:
    """The tile of the split regime. `mixed_layouts`: a gradient comes with the other layout than x."""
    limit_c, limit_s = triton.next_power_of_2(problem.channels), triton.next_power_of_2(problem.pixels)
    elements = 32 * configuration.split_warps * elements_per_thread
    if mixed_layouts:
        elements = max(elements, configuration.square**2)
    if problem.channels_last or mixed_layouts:
        # Full lines along the channels; and along the pixels for a gradient in the other layout.
        block_c = min(limit_c, max(configuration.square, elements // limit_s))
        block_s = min(limit_s, elements // block_c)
    else:
        # Long runs of pixels and few channels: their parameters cost next to nothing.
        block_s = min(limit_s, max(elements // 4, elements // limit_c))
        block_c = min(limit_c, elements // block_s)
    num_warps = max(1, block_c * block_s // (32 * elements_per_thread))
    channel_tiles, pixel_tiles = triton.cdiv(problem.channels, block_c), triton.cdiv(problem.pixels, block_s)
    tiles_per_program = problem.batch * channel_tiles * pixel_tiles // configuration.programs_per_wave
    tiles_per_program = min(configuration.max_tiles_per_program, max(1, tiles_per_program))
    return SplitTile(block_c, block_s, channel_tiles, pixel_tiles, tiles_per_program, num_warps)
