"""Every Triton version of geglu, compiled for GPUs that are not here."""

from collections import defaultdict

import pytest
import torch
from fastdistill.kernels.compile import compile_for
from fastdistill.kernels.geglu import Probe, Tile, specialisations
from fastdistill.kernels.launch import unique_specialisations

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
def test_the_gate_sees_a_spill(versions):
    assert compile_for(90, versions["_backward_kernel"][0], maxnreg=24).resources.spilled > 0


@pytest.mark.compiler
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("row_gap", [0, 16], ids=["dense", "sliced"])
@pytest.mark.parametrize("columns", [320, 1280, 5120])
def test_aligned_rows_move_in_16_byte_accesses_alone(columns, row_gap, capability):
    for name, specialisation in launched(Probe(1024, columns, torch.bfloat16, row_gap=row_gap)).items():
        ptx = compile_for(capability, specialisation).ptx
        loads = [line for line in ptx.splitlines() if "ld.global" in line]
        stores = [line for line in ptx.splitlines() if "st.global" in line]
        assert loads, name
        assert stores, name
        assert all(".v4.b32" in line for line in loads + stores), name


def test_a_view_that_starts_one_element_late_is_not_taken_for_aligned():
    probe, late = Probe(1024, 1280), Probe(1024, 1280, storage_offset=1)
    for name, aligned in launched(probe).items():
        x = next(index for index, parameter in enumerate(aligned.kernel.params) if parameter.name == "x_ptr")
        assert (x,) in aligned.attrs, name
        assert (x,) not in launched(late)[name].attrs, name


def test_another_number_of_rows_compiles_nothing():
    assert launched(Probe(1600, 1280)) == launched(Probe(1000, 1280))
    assert launched(Probe(16384, 1280)) == launched(Probe(65536, 1280))


@pytest.mark.parametrize("columns", [1, 3, 17, 64, 77, 320, 1000, 1280, 2560, 5120, 8192])
@pytest.mark.parametrize("rows", [1, 2, 77, 4096, 100_000])
def test_tiles_cover_every_element_and_waste_little(rows, columns):
    tile = Tile.of(rows, columns)
    across, down = -(-columns // tile.columns), -(-rows // tile.rows)
    assert across * tile.columns >= columns > (across - 1) * tile.columns
    assert down * tile.rows >= rows > (down - 1) * tile.rows
    assert tile.rows * tile.columns <= 2048
    assert across * tile.columns <= max(columns * 9 / 8, columns + 63)
    assert 1 <= tile.num_warps <= 4
