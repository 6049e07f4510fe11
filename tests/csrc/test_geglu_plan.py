"""The CUDA launch plan of geglu, compiled for the host: which thread owns which elements."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiler
SOURCE = Path(__file__).resolve().parent / "geglu_plan.cpp"

# (rows, columns) of the UNets' feed-forward layers at batch 1 and 4, and odd ones.
SITES = [(4096, 1280), (1024, 2560), (256, 5120), (64, 5120), (16384, 1280), (4096, 2560), (1024, 5120), (4096, 5120)]
ODD = [(1, 1), (5, 3), (77, 17), (1, 5000), (300, 1), (100_000, 1), (33, 1025), (1000, 77), (9, 129), (7, 4097)]


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A function of calls (rows, columns, vector) that returns what geglu_plan.cpp prints for each, as numbers."""
    program = tmp_path_factory.mktemp("plan") / "geglu_plan"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    subprocess.run([*compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", SOURCE, "-o", program], check=True)

    def walk(calls):
        lines = "\n".join(" ".join(map(str, call)) for call in calls)
        printed = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout
        return [[float(number) for number in line.split()] for line in printed.splitlines()]

    return walk


def test_every_element_has_one_owner_and_nothing_outside_has_any(walk):
    calls = [(rows, columns, v) for rows, columns in SITES for v in (8, 4, 1)]
    calls += [(rows, columns, v) for rows, columns in ODD for v in (8, 4, 1) if columns % v == 0]
    for call, (least, greatest, outside, _, most_rows, _) in zip(calls, walk(calls), strict=True):
        assert (least, greatest, outside) == (1, 1, 0), call
        assert most_rows <= 2, call


def test_the_widths_of_the_unets_leave_no_thread_without_work(walk):
    calls = [(rows, columns, 8) for rows, columns in SITES]
    for call, (*_, share) in zip(calls, walk(calls), strict=True):
        assert share == 100, call


def test_small_calls_have_a_row_per_thread_and_large_ones_two(walk):
    few, many = walk([(64, 5120, 8), (16384, 1280, 8)])
    assert few[4] == 1
    assert few[3] >= 132, "a block for every multiprocessor of an H200"
    assert many[4] == 2
