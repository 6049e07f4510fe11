"""Every Triton version of attention, compiled for GPUs that are not here."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from fastdistill.kernels.attention.specialisations import Probe, probes, specialisations
from fastdistill.kernels.compile import compile_for
from fastdistill.kernels.launch import unique_specialisations

from tests.kernels.aot import SHARED_MEMORY, assert_fits

KERNELS = (
    "_backward_keys_kernel",
    "_backward_queries_kernel",
    "_combine_kernel",
    "_forward_kernel",
    "_sum_splits_kernel",
    "backward_short_kernel",
    "forward_short_kernel",
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


def test_every_launch_passes_exactly_what_its_kernel_takes():
    for launch in (launch for probe in probes() for launch in probe.launches()):
        assert set(launch.arguments) | set(launch.constexprs) == set(launch.kernel.arg_names), launch.kernel.__name__


@pytest.mark.compiler
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("name", KERNELS)
def test_every_version_compiles_without_spills_and_within_shared_memory(versions, name, capability):
    for specialisation in versions[name]:
        assert_fits(capability, specialisation)


@pytest.mark.compiler
def test_the_gate_sees_a_spill():
    starved = compile_for(90, launched(Probe(1, 8, 1024, 1024, 160))["_backward_keys_kernel"], maxnreg=64)
    assert starved.resources.spilled > 0


@pytest.mark.compiler
@pytest.mark.parametrize("head_dim", [40, 80, 160])
@pytest.mark.parametrize("keys", [77, 1024])
def test_head_dimensions_that_are_no_power_of_two_move_in_16_byte_accesses(head_dim, keys):
    for name, specialisation in launched(Probe(1, 8, 1024, keys, head_dim)).items():
        if name in ("_combine_kernel", "_sum_splits_kernel"):
            continue
        ptx = compile_for(90, specialisation).ptx
        wide = "cp.async.cg.shared.global" in ptx or "ld.global.v4.b32" in ptx
        assert wide, name
        # The last 16 of 77 keys by the last 16 columns are fewer elements than threads.
        assert "ld.global.b16" not in ptx or "short" in name, name


@pytest.mark.compiler
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160, 512])
def test_hopper_multiplies_with_warp_group_instructions_over_many_keys(head_dim):
    for name, specialisation in launched(Probe(8, 8, 4096, 4096, head_dim)).items():
        ptx = compile_for(90, specialisation).ptx
        assert "wgmma.mma_async" in ptx, name


def test_a_new_batch_or_length_with_the_same_overhang_compiles_nothing():
    def keys(batch, rows):
        return {s.key for s in unique_specialisations(Probe(batch, 8, rows, rows, 64).launches())}

    assert keys(8, 2048) == keys(9, 4096) == keys(16, 3072)


def test_memory_that_starts_one_element_late_is_not_taken_for_aligned():
    probe = Probe(16, 8, 1024, 1024, 64, torch.float16)
    for name, specialisation in launched(replace(probe, aligned=False)).items():
        assert specialisation.constexprs["UNIT"] == 1
        index = next(i for i, p in enumerate(specialisation.kernel.params) if p.name == "q_ptr")
        assert (index,) not in specialisation.attrs, name
    assert all(s.constexprs["UNIT"] == 8 for s in launched(probe).values())
