"""The cases, inputs and cost of dmd_gradient's benchmark."""

import pytest
import torch
from fastdistill.bench import dmd_gradient
from fastdistill.bench.modes import MODES

BENCHMARK = dmd_gradient.BENCHMARK
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["1x4x64x64", "1x4x64x64+guided"])
def test_reference_and_kernel_compute_what_the_plain_loop_does(name):
    (case,) = BENCHMARK.select_cases([name])
    inputs = BENCHMARK.setup(case, torch.float32, "contiguous", CPU)
    results = {
        provider.name: MODES["full"](provider.prepare(inputs), inputs).tensors()
        for provider in BENCHMARK.select_providers(["torch", "reference", "cpu"])
    }
    for ours in ("reference", "cpu"):
        for value in ("loss", "grad_x"):
            torch.testing.assert_close(results[ours][value], results["torch"][value], rtol=1e-4, atol=1e-4)
    assert 0.01 < results["torch"]["grad_x"].abs().mean() < 10


def test_the_exact_results_are_computed_in_float64_throughout():
    (case,) = BENCHMARK.select_cases(["1x4x64x64+guided"])
    wide = BENCHMARK.setup(case, torch.bfloat16, "contiguous", CPU).to(torch.float64)
    tensors = [t for t in (*wide.tensors.values(), *wide.constants.values()) if isinstance(t, torch.Tensor)]
    assert len(tensors) == 7
    assert {t.dtype for t in tensors} == {torch.float64}


def test_the_least_traffic_is_each_input_once_and_the_gradient_kept_in_float32():
    size = 4 * 64 * 64
    (plain,) = BENCHMARK.select_cases(["1x4x64x64"])[:1]
    guided = next(case for case in BENCHMARK.cases if case.name == "1x4x64x64+guided")
    assert BENCHMARK.cost(plain, torch.bfloat16, "forward").bytes == (4 * 2 + 4) * size
    assert BENCHMARK.cost(guided, torch.bfloat16, "forward").bytes == (5 * 2 + 4) * size
    assert BENCHMARK.cost(plain, torch.float32, "full").bytes == (4 * 4 + 4 + 4 + 4) * size


def test_a_forward_pass_reads_its_constants_too():
    (case,) = BENCHMARK.select_cases(["1x4x64x64"])
    inputs = BENCHMARK.setup(case, torch.float32, "contiguous", CPU)
    assert inputs.nbytes("forward") == 4 * (4 * 4 * 64 * 64 + 2)
