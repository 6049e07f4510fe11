"""The examples do what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.compiler  # they stand in the sources
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_over_fused_losses_has_the_plain_loops_losses_for_50_updates():
    plain, plain_average = load("dmd_plain").train(50)
    fused, fused_average = load("dmd_fused").train(50)
    assert len(plain) == 50
    for (loss, fake), (fused_loss, fused_fake) in zip(plain, fused):
        # Rounding, which every update carries on.
        assert fused_loss == pytest.approx(loss, rel=2e-5)
        assert fused_fake == pytest.approx(fake, rel=2e-5)
    assert plain[-1][1] < plain[0][1] / 2
    for ours, theirs in zip(fused_average, plain_average):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
