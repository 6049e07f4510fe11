"""The CUDA launch plan of dmd_gradient, compiled for the host."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiler
SOURCE = Path(__file__).resolve().parent / "dmd_gradient_plan.cpp"
THREADS, KEPT, H200 = 512, 24, 132


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A function of (samples, elements, vector, …) that returns what dmd_gradient_plan.cpp prints, as numbers."""
    program = tmp_path_factory.mktemp("plan") / "dmd_gradient_plan"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    subprocess.run([*compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", SOURCE, "-o", program], check=True)

    def plan(samples, elements, vector=8, multiprocessors=H200, cooperative=1):
        call = f"{samples} {elements // vector} {vector} {multiprocessors} {cooperative}"
        printed = subprocess.run([program], input=call, capture_output=True, text=True, check=True).stdout
        return [int(number) for number in printed.split()]

    return plan


# Latents of 512 and 1024 px, pixels at 512 px, a video latent, odd sizes; what fits and what does not.
SIZES = [(1, 16384), (8, 16384), (4, 65536), (2, 786432), (1, 1123200), (132, 8), (133, 8), (3, 4095), (1, 1622016),
         (1, 1622032), (64, 786432)]  # fmt: skip


@pytest.mark.parametrize("vector", [8, 4, 1])
def test_every_vector_belongs_to_one_block_which_can_keep_it(plan, vector):
    for samples, elements in SIZES:
        if elements % vector:
            continue
        whole, blocks, splits, each, reached = plan(samples, elements, vector)
        vectors = elements // vector
        assert reached >= vectors > reached - each, "no block without work"
        assert blocks == samples * splits
        assert whole == (samples <= H200 and samples * elements <= H200 * THREADS * KEPT)
        if whole:
            assert blocks <= H200
            assert each * vector <= THREADS * KEPT
        else:
            assert each * vector < 2**24, "counted in a float"


def test_a_batch_of_latents_is_one_launch_with_a_vector_per_thread(plan):
    whole, blocks, *_ = plan(8, 4 * 64 * 64, vector=4)
    assert whole
    assert blocks == 64


def test_without_a_grid_that_waits_there_are_three_launches(plan):
    assert plan(8, 16384, cooperative=0)[0] == 0
