"""The CUDA launch plan of weighted_squared_error, compiled for the host: which thread owns which elements."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiler
SOURCE = Path(__file__).resolve().parent / "weighted_squared_error_plan.cpp"

LATENTS, PIXELS = (8, 4 * 64 * 64), (2, 3 * 512 * 512)
SITES = [LATENTS, PIXELS, (4, 4 * 128 * 128), (1, 16 * 16 * 60 * 90)]
ODD = [(1, 1), (5, 3), (4096, 2), (4500, 5), (3, 12285), (1, 5001), (100_000, 1), (700, 77), (2, 4099)]


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A function of calls that returns what weighted_squared_error_plan.cpp prints for each, as numbers."""
    program = tmp_path_factory.mktemp("plan") / "plan"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    subprocess.run([*compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", SOURCE, "-o", program], check=True)

    def walk(calls):
        lines = "\n".join(" ".join(map(str, call)) for call in calls)
        printed = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout
        return [[int(number) for number in line.split()] for line in printed.splitlines()]

    return walk


def test_every_element_has_one_owner_and_nothing_outside_has_any(walk):
    calls = [(*shape, v, cluster) for shape in SITES + ODD for v in (8, 4, 1) for cluster in (0, 1, 8)]
    calls = [call for call in calls if call[1] % call[2] == 0]
    for call, (least, greatest, outside, *_) in zip(calls, walk(calls), strict=True):
        assert (least, greatest, outside) == (1, 1, 0), call


def test_eight_latents_are_one_cluster_and_pixels_fill_the_device(walk):
    calls = [(*LATENTS, 4, 8), (*LATENTS, 4, 1), (*PIXELS, 4, 8), (*PIXELS, 8, 0)]
    found = [tuple(numbers[3:]) for numbers in walk(calls)]
    assert found[0] == (8, 1, 8)
    assert found[1][1] == 0
    assert found[1][0] > 8
    for blocks, cluster, vectors in found[2:]:
        assert 2 * 132 <= blocks <= 8 * 132
        assert (cluster, vectors) in ((0, 1), (0, 2), (0, 3), (0, 4))


def test_a_cluster_is_a_power_of_two(walk):
    calls = [(batch, length, 1, 8) for batch in (1, 3, 5, 600) for length in (1, 700, 3000, 12285)]
    for call, (*_, blocks, cluster, vectors) in zip(calls, walk(calls), strict=True):
        if cluster:
            assert blocks in (1, 2, 4, 8), call
            assert vectors <= 16, call
