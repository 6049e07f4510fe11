"""Which regime and which tiles group_norm_silu chooses in Triton."""

import math
from dataclasses import replace

import pytest
import torch
from fastdistill.kernels.group_norm_silu import configuration as table
from fastdistill.kernels.group_norm_silu.configuration import DEFAULT, configurations
from fastdistill.kernels.group_norm_silu.tiles import (
    Problem,
    choose_split_tile,
    choose_whole_tile,
)
from hypothesis import given
from hypothesis import strategies as st

MAX_WHOLE_FORWARD = DEFAULT.max_whole_forward

problems = st.builds(
    lambda batch, per_group, groups, pixels, channels_last: Problem(
        batch, per_group * groups, pixels, groups, channels_last
    ),
    st.integers(1, 64),
    st.integers(1, 3000),
    st.integers(1, 64),
    st.integers(1, 2**24),
    st.booleans(),
)


@given(problems, st.sampled_from(configurations()))
def test_a_whole_tile_holds_whole_groups_and_all_pixels(problem, configuration):
    tile = choose_whole_tile(problem, MAX_WHOLE_FORWARD, configuration)
    if tile is None:
        return
    assert tile.channels == tile.groups * problem.channels_per_group
    assert tile.block_c >= tile.channels
    assert tile.block_s >= problem.pixels
    assert tile.block_g >= tile.groups
    assert tile.block_c * tile.block_s <= MAX_WHOLE_FORWARD
    assert tile.channels % tile.channel_unit == 0


@given(problems, st.sampled_from(configurations()), st.booleans())
def test_split_tiles_cover_every_channel_and_pixel_once(problem, configuration, mixed_layouts):
    tile = choose_split_tile(problem, 8, configuration, mixed_layouts)
    assert tile.block_c * tile.block_s <= 4096
    assert tile.num_warps in (1, 2, 4, 8, 16)
    assert (tile.channel_tiles - 1) * tile.block_c < problem.channels <= tile.channel_tiles * tile.block_c
    assert (tile.pixel_tiles - 1) * tile.block_s < problem.pixels <= tile.pixel_tiles * tile.block_s
    # Every split has at least one pixel: a partial mean divides by their number.
    assert (tile.splits - 1) * tile.pixels_per_split < problem.pixels <= tile.splits * tile.pixels_per_split


@pytest.mark.parametrize(
    ("per_group", "channels"), [(4, 16), (10, 80), (16, 16), (20, 80), (30, 240), (40, 80), (80, 80)]
)
def test_channels_last_rows_are_whole_groups_and_whole_sectors(per_group, channels):
    tile = choose_whole_tile(Problem(1, 32 * per_group, 16, 32, channels_last=True), MAX_WHOLE_FORWARD, DEFAULT)
    assert tile.channels == channels == math.lcm(16, per_group)


def test_a_row_too_short_for_a_sector_is_left_to_the_split_regime():
    # One channel per group and as many pixels as a tile has elements: rows of two bytes.
    assert (
        choose_whole_tile(Problem(1, 32, MAX_WHOLE_FORWARD, 32, channels_last=True), MAX_WHOLE_FORWARD, DEFAULT) is None
    )
    assert (
        choose_whole_tile(
            Problem(1, 32, MAX_WHOLE_FORWARD, 32, channels_last=False), MAX_WHOLE_FORWARD, DEFAULT
        ).channels
        == 1
    )


def test_a_gpu_takes_its_entry_by_name_then_by_capability(monkeypatch):
    table._of_gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    named = replace(DEFAULT, split_warps=4)
    monkeypatch.setitem(table.BY_NAME, "GPU 1", named)
    assert table.configuration_for(torch.device("cuda", 0)) is table.BY_CAPABILITY[8, 0]
    assert table.configuration_for(torch.device("cuda", 1)) is named
    assert table.configuration_for(torch.device("meta")) is DEFAULT
    table._of_gpu.cache_clear()
