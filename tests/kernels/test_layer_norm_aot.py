"""Every Triton version of layer_norm, compiled for GPUs that are not here."""

from collections import defaultdict
from dataclasses import replace

import pytest
from fastdistill.kernels.compile import compile_for
from fastdistill.kernels.launch import unique_specialisations
from fastdistill.kernels.layer_norm.specialisations import Probe, specialisations

from tests.kernels.aot import SHARED_MEMORY, assert_fits

KERNELS = (
    "_forward_whole_kernel",
    "_forward_blocks_kernel",
    "_backward_whole_kernel",
    "_backward_blocks_kernel",
    "_sum_partials_kernel",
)


@pytest.fixture(scope="module")
def versions():
    by_kernel = defaultdict(list)
    for specialisation in specialisations():
        by_kernel[specialisation.kernel.__name__].append(specialisation)
    return by_kernel


def launched(probe):
    return {s.kernel.__name__: s for s in unique_specialisations(probe.launches())}


def test_the_probes_reach_every_kernel(versions):
    assert sorted(versions) == sorted(KERNELS)


@pytest.mark.compiler
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("name", KERNELS)
def test_every_version_compiles_without_spills_and_within_shared_memory(versions, name, capability):
    for specialisation in versions[name]:
        assert_fits(capability, specialisation)


@pytest.mark.compiler
def test_the_gate_sees_a_spill():
    starved = compile_for(90, launched(Probe((64, 6140)))["_backward_whole_kernel"], maxnreg=40)
    assert starved.resources.spilled > 0


@pytest.mark.compiler
@pytest.mark.parametrize("columns", [320, 1280, 20480])
def test_aligned_rows_move_in_16_byte_accesses(columns):
    for name, specialisation in launched(Probe((64, columns))).items():
        if name == "_sum_partials_kernel":
            continue
        ptx = compile_for(90, specialisation).ptx
        assert "ld.global.v4.b32" in ptx, name
        assert "st.global.v4.b32" in ptx, name


def test_a_view_that_starts_one_element_late_is_not_taken_for_aligned():
    probe = Probe((64, 1280), residual=False)
    late = replace(probe, storage_offset=1)
    for name, parameter in (("_forward_whole_kernel", "x_ptr"), ("_backward_whole_kernel", "s_ptr")):
        aligned = launched(probe)[name]
        index = next(i for i, p in enumerate(aligned.kernel.params) if p.name == parameter)
        assert (index,) in aligned.attrs, name
        assert (index,) not in launched(late)[name].attrs, name


def test_a_new_number_of_rows_compiles_nothing():
    def keys(rows):
        return {s.key for s in unique_specialisations(Probe((rows, 640)).launches())}

    assert keys(1000) == keys(4096) == keys(77)
