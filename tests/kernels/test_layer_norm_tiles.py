"""Which tiles layer_norm chooses in Triton."""

import pytest
from fastdistill.kernels.layer_norm.tiles import MAX_WHOLE_FORWARD, WARPS_PER_WAVE, choose_programs, choose_tile
from hypothesis import given
from hypothesis import strategies as st


def power_of_two(n):
    return n & (n - 1) == 0


@given(st.integers(1, 10**7), st.integers(1, MAX_WHOLE_FORWARD))
def test_a_tile_holds_whole_rows_and_wastes_at_most_a_third(rows, columns):
    tile = choose_tile(rows, columns, MAX_WHOLE_FORWARD)
    assert tile.head + tile.tail >= columns
    assert tile.tail == 0 or tile.head < columns
    assert all(power_of_two(n) for n in (tile.rows, tile.head, tile.num_warps))
    assert tile.tail == 0 or power_of_two(tile.tail)
    assert 3 * columns > 2 * (tile.head + tile.tail) or columns < 3
    assert tile.rows * (tile.head + tile.tail) <= max(2048, tile.head + tile.tail)
    assert tile.rows < 2 * rows
    assert tile.num_warps <= 16


@pytest.mark.parametrize("columns", [320, 640, 768, 1280, 2560, 5120])
def test_the_widths_of_the_unets_waste_nothing(columns):
    tile = choose_tile(4096, columns, MAX_WHOLE_FORWARD)
    assert tile.head + tile.tail == columns


def test_a_row_too_long_for_registers_has_no_tile():
    assert choose_tile(8, MAX_WHOLE_FORWARD + 1, MAX_WHOLE_FORWARD) is None


@given(st.integers(1, 10**7), st.sampled_from([1, 2, 4, 8, 16]))
def test_every_program_has_a_tile(tiles, num_warps):
    programs = choose_programs(tiles, num_warps)
    assert 1 <= programs <= tiles
    assert programs * num_warps <= WARPS_PER_WAVE
