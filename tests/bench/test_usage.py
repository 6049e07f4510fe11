"""Memory at its peak, and what is dispatched."""

import torch
import torch.nn.functional as F
from fastdistill.bench.usage import on_cpu

MIB = 1 << 20


def test_the_peak_holds_temporaries_and_results_but_not_inputs():
    x = torch.randn(MIB // 4)  # 1 MiB

    def run():
        y = torch.relu(x)  # 1
        z = torch.cat([y, y])  # 3
        del y
        return z.sum()  # and a few bytes

    assert 3 * MIB <= on_cpu(run).peak_bytes < 3.01 * MIB


def test_memory_that_is_used_again_counts_once():
    x = torch.randn(MIB // 4)

    def run():
        for _ in range(5):
            torch.relu(x)

    assert MIB <= on_cpu(run).peak_bytes < 1.01 * MIB


def test_ops_within_ops_are_not_counted():
    x = torch.randn(1, 64, 8, 8)
    assert on_cpu(lambda: F.silu(F.group_norm(x, 32))).launches == 2


def test_what_a_compiler_made_is_not_counted():
    assert on_cpu(lambda: torch.zeros(3), compiled=True).launches is None
