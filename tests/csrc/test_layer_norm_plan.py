"""The CUDA launch plans of layer_norm, compiled for the host: which threads hold what, and in how many blocks."""

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiler
SOURCE = Path(__file__).resolve().parent / "layer_norm_plan.cpp"
WARP, BLOCK, LOOP = range(3)

# (rows, columns, vector): the UNets' widths in 16 bits and float32, and odd ones.
SITES = [(4096, 320, 8), (1024, 640, 8), (256, 1280, 8), (77, 768, 8), (77, 1280, 8), (4096, 640, 4), (1024, 1280, 4)]
ODD = [(1, 1, 1), (5, 3, 1), (77, 17, 1), (9, 24, 8), (3, 2048, 8), (7, 5120, 8), (100_000, 8192, 8), (2, 8200, 8)]
ODD += [(1, 1_000_000, 8), (33, 321, 1), (4, 8191, 1)]


@dataclass(frozen=True)
class Plan:
    kind: int
    elements: int
    threads: int
    blocks: int
    rows: int

    @property
    def threads_of_a_row(self):
        return 32 if self.kind == WARP else self.threads


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """A function of calls that returns (forward, backward with sums, backward without) for each."""
    program = tmp_path_factory.mktemp("plan") / "layer_norm_plan"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    subprocess.run([*compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", SOURCE, "-o", program], check=True)

    def plans(calls, multiprocessors=132):
        lines = "\n".join(" ".join(map(str, (*call, multiprocessors))) for call in calls)
        printed = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout
        numbers = [list(map(int, line.split())) for line in printed.splitlines()]
        return [tuple(Plan(*line[i : i + 5]) for i in (0, 5, 10)) for line in numbers]

    return plans


def test_the_threads_of_a_row_hold_all_of_it_in_whole_vectors(plans):
    for (_, columns, vector), all_plans in zip(SITES + ODD, plans(SITES + ODD), strict=True):
        for plan in all_plans:
            assert plan.threads % 32 == 0
            assert 32 <= plan.threads <= 512
            if plan.kind != LOOP:
                assert plan.elements % vector == 0
                vectors_each = -(-columns // vector // plan.threads_of_a_row)
                assert vectors_each * vector <= plan.elements, (columns, vector)


def test_blocks_reach_every_row_and_none_is_idle(plans):
    for (rows, *_), (forward, sums, without) in zip(SITES + ODD, plans(SITES + ODD), strict=True):
        for plan in (forward, without):
            assert (plan.blocks - 1) * plan.rows < rows <= plan.blocks * plan.rows
        assert 1 <= sums.blocks <= without.blocks


def test_the_backward_with_sums_has_no_more_blocks_than_are_resident(plans):
    calls = [(10**6, 320, 8), (10**6, 640, 8), (10**6, 1280, 8)]
    (_, warp, _), (_, wide, _), (_, block, _) = plans(calls, multiprocessors=108)
    assert (warp.kind, warp.blocks) == (WARP, 3 * 108)
    assert (wide.kind, wide.blocks) == (WARP, 2 * 108)
    assert (block.kind, block.threads, block.blocks) == (BLOCK, 96, 5 * 108)


def test_the_widths_of_the_unets_are_held_by_warps(plans):
    for (_, columns, _), (forward, backward, _) in zip(SITES, plans(SITES), strict=True):
        assert forward.kind == WARP
        assert backward.kind == (WARP if columns <= 768 else BLOCK)


def test_long_rows_and_rows_without_vectors_are_walked_in_a_loop(plans):
    calls = [(2, 8192, 8), (2, 8200, 8), (2, 321, 1)]
    kinds = [{plan.kind for plan in all_plans} for all_plans in plans(calls)]
    assert kinds == [{BLOCK}, {LOOP}, {LOOP}]
