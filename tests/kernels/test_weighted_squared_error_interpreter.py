"""The Triton kernels of weighted_squared_error in Triton's interpreter.

tests/ops/test_weighted_squared_error.py covers the op on every backend. Here outputs and partial sums are poisoned,
tiles are made small, and nothing beside the samples may be read.
"""

import pytest
import torch
from fastdistill.kernels import weighted_squared_error as op
from fastdistill.kernels.launch import run_all

from fastdistill.ops.weighted_squared_error import reference, reference_gradient

pytestmark = pytest.mark.interpreter


@pytest.fixture(params=["tiles as planned", "small tiles"])
def tiles(request, monkeypatch):
    if request.param == "small tiles":
        monkeypatch.setattr(op, "MAX_ELEMENTS", 32)
        monkeypatch.setattr(op, "MIN_ELEMENTS", 16)
        monkeypatch.setattr(op, "LINE", 8)
        monkeypatch.setattr(op, "COMBINED_AT_ONCE", 8)


def run_poisoned(plan):
    launches, output = plan
    for tensor in (output, *(launch.arguments.get("sums_ptr", output) for launch in launches)):
        tensor.fill_(float("nan"))
    run_all(launches, output.device)
    return output


@pytest.mark.parametrize("shape", [(1, 1), (7, 10), (3, 130), (1, 600), (60, 2)])
@pytest.mark.parametrize("gap", [0, 5], ids=["dense", "apart"])
def test_every_element_counts_once_and_nothing_beside_the_samples_is_read(tiles, shape, gap):
    batch, length = shape

    def samples():
        t = torch.full((batch + 1, length + 2 * gap), float("nan"))[:-1, gap : gap + length]
        return t.copy_(torch.randn(shape))

    x, a, b = samples(), samples(), samples()
    scales = torch.randn(batch), torch.randn(batch), torch.rand(batch)
    grad = torch.tensor(1.7)
    call = (x, a, b, *scales, 1.0, 1.0, 1.0)
    wide = [t.double() for t in (x, a, b, *scales)]
    torch.testing.assert_close(run_poisoned(op.plan_forward(*call)).double(), reference(*wide), rtol=2e-6, atol=0)
    ours = run_poisoned(op.plan_backward(grad, *call)).double()
    torch.testing.assert_close(ours, reference_gradient(grad.double(), *wide), rtol=2e-5, atol=1e-6 / x.numel())


def test_one_tile_takes_one_launch():
    def launches(*shape):
        return len(op.plan_forward(torch.zeros(shape), torch.zeros(shape), *(None,) * 4, 1.0, 1.0, 1.0)[0])

    assert launches(2, 512) == 1
    assert launches(2, 4096) == 2
