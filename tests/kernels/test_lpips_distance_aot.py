"""Every Triton version of lpips_distance, compiled for GPUs that are not here."""

from collections import defaultdict

import pytest
import torch
from fastdistill.kernels.compile import compile_for
from fastdistill.kernels.launch import unique_specialisations
from fastdistill.kernels.lpips_distance import Probe, Tile, specialisations

from tests.kernels.aot import SHARED_MEMORY, assert_fits

KERNELS = ("_forward_kernel", "_backward_kernel")


@pytest.fixture(scope="module")
def versions():
    by_kernel = defaultdict(list)
    for specialisation in specialisations():
        by_kernel[specialisation.kernel.__name__].append(specialisation)
    return by_kernel


def launched(probe):
    return {s.kernel.__name__: s for s in unique_specialisations(probe.launches())}


@pytest.mark.compiler
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("name", KERNELS)
def test_every_version_compiles_without_spills_and_within_shared_memory(versions, name, capability):
    for specialisation in versions[name]:
        assert_fits(capability, specialisation)


@pytest.mark.compiler
@pytest.mark.parametrize("layouts", ["cc", "ll"])
def test_aligned_features_move_in_16_byte_accesses(layouts):
    for name, specialisation in launched(Probe((1, 128, 256, 256), torch.bfloat16, layouts)).items():
        ptx = compile_for(90, specialisation).ptx.splitlines()
        # x, y and grad_x; weights, sums and the gradient of the distance are float32 and few.
        loads = [line for line in ptx if "ld.global" in line and ".v4.b32" in line]
        assert len(loads) >= 2, name
        assert not [line for line in ptx if "global" in line and ".b16" in line], name


def test_another_batch_or_image_size_of_the_same_alignment_compiles_nothing():
    assert launched(Probe((2, 64, 256, 256))) == launched(Probe((3, 64, 256, 128)))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 63, 64, 512, 768, 1024, 5000])
@pytest.mark.parametrize("pixels", [1, 7, 1024, 512 * 512])
def test_tiles_hold_all_channels_or_say_that_they_do_not(channels, pixels, rows):
    tile = Tile.of(2, channels, pixels, rows=rows)
    assert tile.channels * tile.pixels <= 2048
    assert tile.whole == (tile.channels >= channels)
    assert 1 <= tile.num_warps <= 4
