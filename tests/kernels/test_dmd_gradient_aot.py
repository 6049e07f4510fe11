"""Every Triton version of dmd_gradient, compiled for GPUs that are not here."""

from collections import defaultdict

import pytest
import torch
from fastdistill.kernels.compile import compile_for
from fastdistill.kernels.dmd_gradient import Probe, specialisations
from fastdistill.kernels.launch import unique_specialisations

from tests.kernels.aot import SHARED_MEMORY, assert_fits

KERNELS = ("_whole_kernel", "_distance_kernel", "_gradient_kernel", "_finish_kernel", "_backward_kernel")


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
    assert versions[name]
    for specialisation in versions[name]:
        assert_fits(capability, specialisation)


@pytest.mark.compiler
def test_the_gate_sees_a_spill(versions):
    assert compile_for(90, versions["_whole_kernel"][0], maxnreg=24).resources.spilled > 0


@pytest.mark.compiler
@pytest.mark.parametrize("elements", [4 * 64 * 64, 4 * 128 * 128], ids=["whole", "tiles"])
def test_aligned_samples_move_in_16_byte_accesses(elements):
    for name, specialisation in launched(Probe(8, elements, torch.bfloat16, torch.bfloat16)).items():
        if name == "_finish_kernel":
            continue
        lines = compile_for(90, specialisation).ptx.splitlines()
        wide = [line for line in lines if ".v4.b32" in line]
        assert any("ld.global" in line for line in wide), name
        assert name == "_distance_kernel" or any("st.global" in line for line in wide), name


def test_a_sample_is_kept_by_one_program_or_cut_into_tiles():
    kept, cut = ["_whole_kernel"], ["_distance_kernel", "_gradient_kernel"]
    rest = ["_finish_kernel", "_backward_kernel"]
    assert list(launched(Probe(8, 16384))) == kept + rest
    assert list(launched(Probe(8, 16400))) == cut + rest
    assert list(launched(Probe(8, 8191))) == kept + rest
    assert list(launched(Probe(8, 16384, storage_offset=1))) == cut + rest


def test_another_batch_size_compiles_nothing():
    for elements in (4 * 64 * 64, 4 * 128 * 128):
        assert launched(Probe(2, elements)) == launched(Probe(5, elements))
