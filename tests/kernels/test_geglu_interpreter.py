"""The Triton kernels of geglu in Triton's interpreter.

tests/ops/test_geglu.py covers the op on every backend. Here outputs are poisoned, tiles are made small, and nothing
outside the rows may be read.
"""

import pytest
import torch
import torch.nn.functional as F
from fastdistill.kernels import geglu as op
from fastdistill.kernels.launch import run_all

from tests.ops.accuracy import assert_close_to_exact

pytestmark = pytest.mark.interpreter


@pytest.fixture(params=["tiles as planned", "small tiles"])
def tiles(request, monkeypatch):
    if request.param == "small tiles":
        monkeypatch.setattr(op, "MAX_COLUMNS", 16)
        monkeypatch.setattr(op, "LINE", 8)
        monkeypatch.setattr(op, "ELEMENTS_PER_THREAD", 1)


def in_pytorch(x, grad_y):
    x = x.detach().requires_grad_()
    h, gate = x.chunk(2, -1)
    y = h * F.gelu(gate)
    return y.detach(), *torch.autograd.grad(y, x, grad_y)


def run_poisoned(plan):
    launches, output = plan
    output.fill_(float("nan"))
    run_all(launches, output.device)
    return output


@pytest.mark.parametrize("shape", [(7, 10), (3, 66), (40, 130), (1, 3000), (300, 2)])
@pytest.mark.parametrize("gap", [0, 5], ids=["dense", "sliced"])
def test_every_element_is_written_and_nothing_beside_the_rows_is_read(tiles, shape, gap):
    rows, length = shape

    def rows_of(length):
        t = torch.full((rows + 1, length + 2 * gap), float("nan"))[:-1, gap : gap + length]
        return t.copy_(torch.randn(rows, length))

    x, grad_y = rows_of(length), rows_of(length // 2)
    y, grad_x = run_poisoned(op.plan_forward(x)), run_poisoned(op.plan_backward(grad_y, x))
    exact_y, exact = in_pytorch(x.double(), grad_y.double())
    torch_y, torchs = in_pytorch(x, grad_y)
    assert_close_to_exact(y, exact_y, torch_y, torch.float32, what="y")
    assert_close_to_exact(grad_x, exact, torchs, torch.float32, what="grad_x")


def test_one_row_of_gradients_may_serve_every_row(tiles):
    x, grad_y = torch.randn(6, 34), torch.randn(17).expand(6, 17)
    assert torch.equal(op.geglu_backward(grad_y, x), op.geglu_backward(grad_y.contiguous(), x))
