"""Every Triton version of group_norm_silu, compiled for GPUs that are not here."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from fastdistill.kernels.compile import compile_for
from fastdistill.kernels.group_norm_silu.specialisations import Probe, specialisations
from fastdistill.kernels.launch import unique_specialisations

from tests.kernels.aot import SHARED_MEMORY, assert_fits

KERNELS = (
    "_forward_whole_kernel",
    "_moments_kernel",
    "_combine_moments_kernel",
    "_apply_kernel",
    "_backward_whole_kernel",
    "_gradient_sums_kernel",
    "_combine_gradient_sums_kernel",
    "_apply_gradient_kernel",
    "_sum_over_batch_kernel",
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
def test_the_gate_sees_a_spill(versions):
    starved = compile_for(90, versions["_gradient_sums_kernel"][0], maxnreg=24)
    assert starved.resources.spilled > 0


ALIGNED = {
    "whole": Probe((1, 1280, 8, 8), 32, torch.bfloat16),
    # A tile starts at a multiple of 8 channels, not of 16, which Triton could not see in an argument.
    "whole, 40 channels per tile": Probe((1, 1280, 16, 16), 32, torch.bfloat16),
    "split": Probe((1, 320, 64, 64), 32, torch.bfloat16),
}


@pytest.mark.compiler
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("regime", ALIGNED)
def test_aligned_images_move_in_16_byte_accesses(regime, channels_last):
    for name, specialisation in launched(replace(ALIGNED[regime], channels_last=channels_last)).items():
        if "combine" in name or name == "_sum_over_batch_kernel":
            continue
        ptx = compile_for(90, specialisation).ptx
        assert "ld.global.v4.b32" in ptx, name
        if name not in ("_moments_kernel", "_gradient_sums_kernel"):  # they write a few floats per program
            assert "st.global.v4.b32" in ptx, name


def test_a_view_that_starts_one_element_late_is_not_taken_for_aligned():
    probe = Probe((1, 1280, 8, 8), 32, torch.bfloat16)
    late = replace(probe, storage_offset=1)
    for name, aligned in launched(probe).items():
        x = next(index for index, parameter in enumerate(aligned.kernel.params) if parameter.name == "x_ptr")
        assert (x,) in aligned.attrs, name
        assert (x,) not in launched(late)[name].attrs, name


def test_sizes_beyond_32_bits_are_passed_as_64():
    huge = launched(Probe((1, 64, 6000, 6000), 32, torch.bfloat16))["_apply_kernel"]
    assert huge.signature["x_stride_n"] == "i64"
    assert huge.signature["pixels"] == "i32"
