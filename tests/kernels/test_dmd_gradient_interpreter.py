"""The Triton kernels of dmd_gradient in Triton's interpreter.

tests/ops/test_dmd_gradient.py covers the op on every backend. Here outputs are poisoned, samples are cut into small
tiles, and nothing outside the samples may be read.
"""

import pytest
import torch
from fastdistill.kernels import dmd_gradient as op
from fastdistill.kernels.launch import run_all

from fastdistill import diffusion
from fastdistill.ops.dmd_gradient import reference

pytestmark = pytest.mark.interpreter


@pytest.fixture(params=["tiles as planned", "small tiles"])
def tiles(request, monkeypatch):
    if request.param == "small tiles":
        monkeypatch.setattr(op, "MAX_WHOLE", 16)
        monkeypatch.setattr(op, "MAX_WHOLE_UNALIGNED", 16)
        monkeypatch.setattr(op, "TILE", 32)
        monkeypatch.setattr(op, "FINISH", 4)


def samples(count, elements, gap):
    memory = torch.full((count * (elements + gap),), float("nan"))
    return memory.as_strided((count, elements), (elements + gap, 1)).copy_(torch.randn(count, elements))


@pytest.mark.parametrize("gap", [0, 5], ids=["dense", "apart"])
@pytest.mark.parametrize("shape", [(3, 70), (1, 1), (2, 321), (5, 16)])
def test_every_result_is_written_and_nothing_beside_the_samples_is_read(tiles, shape, gap):
    x, x_t, real, fake, uncond = (samples(*shape, gap) for _ in range(5))
    fake[0, -1] = float("inf")
    alpha, sigma = torch.rand(2, shape[0]) + 0.1
    terms = diffusion.prediction_terms("v_prediction")
    launches, results = op.plan_forward(x, x_t, real, fake, uncond, alpha, sigma, 0.0, 0.0, *terms, 3.0, 0.25)
    for result in results:
        result.fill_(float("nan") if result.is_floating_point() else -1)
    run_all(launches, x.device)
    expected = reference(x, x_t, real, fake, alpha, sigma, uncond, 3.0, "v_prediction")
    expected = (expected[0], 0.25 * expected[1], *expected[2:])
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    launches, grad_x = op.plan_backward(torch.tensor(2.0), results[1], torch.float32)
    grad_x.fill_(float("nan"))
    run_all(launches, x.device)
    torch.testing.assert_close(grad_x, 2.0 * results[1])
