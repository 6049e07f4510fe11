"""The benchmarks of adversarial_loss and squared_norm: every provider computes the same, and bytes are counted once."""

import pytest
import torch
from fastdistill.bench import adversarial_loss, squared_norm
from fastdistill.bench.benchmark import Case
from fastdistill.bench.modes import MODES

OPS = {"adversarial_loss": adversarial_loss, "squared_norm": squared_norm}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_computes_what_the_baseline_does(op, dtype):
    benchmark = OPS[op].BENCHMARK
    for variant in sorted({case.variant for case in benchmark.cases}):
        inputs = benchmark.setup(Case((3, 7, 5), (), variant), dtype, "contiguous", torch.device("cpu"))
        expected = MODES["full"](
            benchmark.baseline.prepare(inputs.to(torch.float64)), inputs.to(torch.float64)
        ).tensors()
        for provider in benchmark.select_providers(["cpu", "reference", "torch"]):
            assert provider.missing(inputs) == []
            found = MODES["full"](provider.prepare(inputs), inputs).tensors()
            assert found.keys() == expected.keys()
            for name, exact in expected.items():
                largest = exact.abs().max().item()
                torch.testing.assert_close(found[name].double(), exact, rtol=0, atol=0.02 * largest)


def test_logits_are_read_once_and_their_gradients_written_once():
    logits = 2 * 8 * 5 * 197
    benchmark = adversarial_loss.BENCHMARK
    (case,) = benchmark.select_cases(["5x1x197"])
    assert benchmark.cost(case, torch.float16, "forward").bytes == 2 * logits
    assert benchmark.cost(case, torch.float16, "full").bytes == 2 * 3 * logits


def test_a_norm_reads_its_tensors_and_its_gradient_reads_and_writes_them():
    size = 8 * 5 * 384 * 197
    (case,) = squared_norm.BENCHMARK.select_cases(["5x384x197"])
    assert squared_norm.BENCHMARK.cost(case, torch.float32, "forward").bytes == 4 * size
    assert squared_norm.BENCHMARK.cost(case, torch.float32, "backward").bytes == 4 * 2 * size
