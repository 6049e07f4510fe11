"""What losses keep and hold is counted by storage, and the fused ones keep nothing of their inputs' size."""

import pytest
import torch
from fastdistill.bench.loss_memory import COMPARISONS, DMD, Memory, app, measure
from typer.testing import CliRunner


def test_every_storage_counts_once_while_it_lives_and_gradients_do_not():
    x, y = torch.randn(1000, requires_grad=True), torch.randn(1000)

    def loss(x, y):
        difference = x - y  # kept by the square
        freed = torch.exp(difference.detach())
        del freed
        return difference.view(10, 100).square().sum()

    # The difference and the square; in the backward the difference alone, its factor of 2 and the square's gradient.
    memory = measure(loss, {"x": x, "y": y})
    assert memory.saved == 4000
    assert 8000 <= memory.peak <= 12016


def test_inputs_count_nowhere():
    x = torch.randn(1000, requires_grad=True)
    assert measure(lambda x: (x.view(10, 100) * x.view(10, 100).detach()).sum(), {"x": x}).saved == 0


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: c.name)
def test_a_fused_loss_keeps_a_number_per_sample_at_most(comparison):
    inputs = comparison.inputs()
    size = next(iter(inputs.values())).nbytes
    fused, eager = measure(comparison.fused, inputs), measure(comparison.eager, inputs)
    assert isinstance(fused, Memory)
    assert fused.saved < 0.002 * size
    assert fused.peak < 0.003 * size
    assert eager.peak >= 2 * fused.peak
    assert eager.saved >= size


def test_the_dmd_loss_keeps_its_gradient_alone():
    inputs = DMD.inputs()
    size = inputs["x"].nbytes
    fused, eager = measure(DMD.fused, inputs), measure(DMD.eager, inputs)
    assert fused.saved == size
    assert fused.peak < 1.01 * size
    assert eager.peak >= 4 * fused.peak


@pytest.mark.parametrize("comparison", [*COMPARISONS, DMD], ids=lambda c: c.name)
def test_both_sides_of_a_comparison_compute_the_same(comparison):
    inputs = comparison.inputs()
    torch.testing.assert_close(comparison.fused(**inputs), comparison.eager(**inputs), rtol=1e-3, atol=1e-5)


def test_the_command_prints_a_line_per_loss():
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0, result.output
    assert result.output.count("add_distillation_loss") == 2
