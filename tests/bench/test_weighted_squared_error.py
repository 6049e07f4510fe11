"""The cases, costs and inputs of weighted_squared_error, and that its baseline is the op."""

import pytest
import torch
from fastdistill.bench.weighted_squared_error import BENCHMARK, VELOCITY, Case

CPU = torch.device("cpu")
SMALL = [Case((3, 2, 5, 7), ()), Case((3, 2, 5, 7), (), VELOCITY), Case((1, 2, 3, 5, 7), (), VELOCITY)]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_and_the_baseline_compute_the_same_loss(case, dtype):
    inputs = BENCHMARK.setup(case, dtype, "contiguous", CPU)
    arguments = {**inputs.tensors, **inputs.constants}
    assert inputs.tensors["x"].dtype == dtype
    theirs = BENCHMARK.baseline.prepare(inputs)(**arguments)
    for provider in BENCHMARK.select_providers(["cpu", "reference"]):
        assert provider.missing(inputs) == []
        torch.testing.assert_close(provider.prepare(inputs)(**arguments), theirs, atol=1e-5, rtol=1e-5)


def test_targets_are_read_twice_in_a_training_step_and_written_never():
    size = 8 * 4 * 64 * 64
    plain, velocity = BENCHMARK.select_cases(["8x4x64x64", "8x4x64x64+velocity"])
    assert BENCHMARK.cost(plain, torch.float32, "forward").bytes == 4 * 2 * size
    assert BENCHMARK.cost(plain, torch.bfloat16, "full").bytes == 2 * 5 * size
    assert BENCHMARK.cost(velocity, torch.bfloat16, "forward").bytes == (2 + 4 + 4) * size
    assert BENCHMARK.cost(velocity, torch.bfloat16, "backward").bytes == (2 + 4 + 4 + 2) * size
