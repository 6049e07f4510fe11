"""Which tiles attention chooses in Triton."""

import pytest
from fastdistill.kernels.attention import tiles
from fastdistill.kernels.attention.tiles import (
    Problem,
    backward_tile,
    choose_block,
    choose_splits,
    forward_tile,
    head_parts,
    padded,
    short_backward,
    short_backward_tile,
    short_forward,
    slices,
)
from hypothesis import given
from hypothesis import strategies as st

PROBLEMS = st.builds(
    Problem,
    heads=st.integers(1, 512),
    queries=st.integers(1, 20000),
    keys=st.integers(1, 20000),
    head_dim=st.integers(1, 64).map(lambda n: 8 * n),
    itemsize=st.sampled_from([2, 4]),
    aligned=st.booleans(),
)
PROCESSORS = st.sampled_from([1, 82, 108, 132, 148])


def power_of_two(n):
    return n & (n - 1) == 0


@pytest.mark.parametrize(
    ("size", "widths"),
    [
        (8, [16]),
        (24, [32]),
        (40, [32, 16]),
        (64, [64]),
        (72, [64, 16]),
        (77, [64, 16]),
        (80, [64, 16]),
        (96, [64, 32]),
        (112, [64, 32, 16]),
        (128, [128]),
        (160, [128, 32]),
        (248, [256]),
        (512, [512]),
    ],
)
def test_a_size_is_cut_into_powers_of_two(size, widths):
    assert [width for _, width in slices(size)] == widths


@given(st.integers(1, 512))
def test_slices_follow_each_other_and_only_the_last_overhangs(size):
    parts = slices(size)
    assert len(parts) <= 3
    assert all(width >= 16 and power_of_two(width) for _, width in parts)
    assert [first for first, _ in parts] == [sum(w for _, w in parts[:i]) for i in range(len(parts))]
    assert parts[-1][0] < size <= padded(parts)


@given(st.integers(1, 64), st.sampled_from([160, 256]))
def test_the_parts_of_a_head_cover_it_in_whole_vectors(eights, undivided):
    head_dim = 8 * eights
    parts = head_parts(head_dim, undivided)
    assert parts.count == (1 if head_dim <= undivided else 2)
    assert parts.width % 8 == 0
    assert parts.width * (parts.count - 1) < head_dim <= parts.width * parts.count
    # The last slice is the only one that is masked.
    assert slices(parts.width)[-1][0] <= head_dim - parts.width * (parts.count - 1)


@given(PROBLEMS, PROCESSORS)
def test_every_split_of_every_plan_has_rows_and_none_is_left_over(problem, processors):
    forward = forward_tile(problem, processors)
    keys = backward_tile(problem.keys, problem.queries, problem, processors, split=True)
    short = short_backward_tile(problem, processors)
    for tile, others in ((forward, problem.keys), (keys, problem.queries), (short, problem.queries)):
        assert tile.splits * tile.per_split >= others
        assert (tile.splits - 1) * tile.per_split < others
        assert tile.per_split % tile.step == 0
    for tile in (forward, keys):
        assert power_of_two(tile.block)
        assert power_of_two(tile.step)
        assert tile.step >= 16
        assert 16 <= tile.block <= 128


@given(PROBLEMS, PROCESSORS)
def test_a_split_fills_the_device_but_no_more(problem, processors):
    tile = forward_tile(problem, processors)
    if tile.splits > 1:
        programs = problem.heads * tiles.triton.cdiv(problem.queries, tile.block) * tile.splits
        assert programs <= processors
        assert tile.per_split >= tiles.TILES_PER_SPLIT * tile.step


@given(st.integers(1, 20000), st.integers(1, 512), st.sampled_from([16, 32, 64, 128]), PROCESSORS)
def test_no_other_block_is_estimated_to_be_faster(rows, groups, largest, processors):
    def time(block):
        return -(-groups * -(-rows // block) // processors) * (block + tiles.ROWS_OF_OVERHEAD)

    chosen = choose_block(rows, groups, largest, processors)
    assert chosen <= largest
    assert all(time(chosen) <= time(block) for block in (32, 64, 128) if block <= largest)


@pytest.mark.parametrize(
    ("queries", "head_dim", "block"), [(4096, 40, 128), (1024, 80, 64), (256, 160, 32), (64, 160, 32)]
)
def test_the_levels_of_stable_diffusion_at_batch_1_on_132_multiprocessors(queries, head_dim, block):
    problem = Problem(8, queries, queries, head_dim, 2)
    assert forward_tile(problem, 132).block == block


def test_the_vae_fills_a_wave_with_two_parts_and_no_split():
    tile = forward_tile(Problem(1, 4096, 4096, 512, 2), 132)
    assert (tile.block, tile.splits) == (64, 1)


@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_text_is_held_at_once(head_dim):
    assert short_forward(Problem(8, 4096, 77, head_dim, 2))
    assert short_backward(Problem(8, 4096, 77, head_dim, 2)) == (head_dim <= 128)
    assert not short_forward(Problem(8, 4096, 129, head_dim, 2))
    assert not short_forward(Problem(8, 4096, 77, head_dim, 4))


def test_few_rows_are_not_split():
    assert choose_splits(100, 32, 1, 132) == (1, 128)
