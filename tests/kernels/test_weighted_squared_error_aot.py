"""Every Triton version of weighted_squared_error, compiled for GPUs that are not here."""

import pytest
import torch
from fastdistill.kernels.compile import compile_for
from fastdistill.kernels.launch import unique_specialisations
from fastdistill.kernels.weighted_squared_error import Probe, Tile, specialisations

from tests.kernels.aot import SHARED_MEMORY, assert_fits

KERNELS = ("_forward_kernel", "_combine_kernel", "_backward_kernel")


def launched(probe):
    return {s.kernel.__name__: s for s in unique_specialisations(probe.launches())}


@pytest.mark.compiler
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_version_compiles_without_spills_and_within_shared_memory(capability):
    versions = specialisations()
    assert {s.kernel.__name__ for s in versions} == set(KERNELS)
    for specialisation in versions:
        assert_fits(capability, specialisation)


@pytest.mark.compiler
def test_the_gate_sees_a_spill():
    backward = launched(Probe(2, 3 * 512 * 512, two=True, scaled=True))["_backward_kernel"]
    assert compile_for(90, backward, maxnreg=24).resources.spilled > 0


@pytest.mark.compiler
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_aligned_samples_move_in_16_byte_accesses_alone(target):
    probe = Probe(8, 16384, target, target, two=True, scaled=True)
    for name in ("_forward_kernel", "_backward_kernel"):
        ptx = compile_for(90, launched(probe)[name]).ptx
        wide = [line for line in ptx.splitlines() if "ld.global.v4.b32" in line]
        assert len(wide) >= 3, name
        # Besides: the scales, the weight and the gradient of the loss.
        assert all(".v4.b32" in line or ".b32" in line for line in ptx.splitlines() if "ld.global" in line), name


def test_another_batch_compiles_nothing():
    assert launched(Probe(8, 16384)) == launched(Probe(6, 16384))


@pytest.mark.parametrize("columns", [1, 2, 3, 64, 77, 4096, 12285, 16384, 786432])
@pytest.mark.parametrize("samples", [1, 2, 7, 64, 100_000])
def test_tiles_cover_every_element_and_waste_little(samples, columns):
    tile = Tile.of(samples, columns)
    across, down = -(-columns // tile.columns), -(-samples // tile.samples)
    assert across * tile.columns >= columns > (across - 1) * tile.columns
    assert down * tile.samples >= samples > (down - 1) * tile.samples
    assert tile.samples * tile.columns <= 4096
    assert across * tile.columns <= max(columns * 9 / 8, columns + 63)
    assert 1 <= tile.num_warps <= 8
