"""The CUDA kernels of geglu, run on the host by the emulator, against float64.

tests/ops/test_geglu.py covers the op on every backend, where there is a GPU.
"""

import pytest
import torch
import torch.nn.functional as F

from tests.csrc.emulator import Device
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import DTYPES, gradients, in_every_dtype

pytestmark = pytest.mark.compiler


@pytest.fixture
def run(emulator):
    """(y, grad_x); what is allocated is full of NaN before."""

    def run(x, grad_y):
        with emulator.on(Device()):
            return (
                torch.ops.fastdistill.geglu.cuda(x),
                torch.ops.fastdistill.geglu_backward.cuda(grad_y, x),
            )

    return run


def in_pytorch(x):
    h, gate = x.chunk(2, -1)
    return h * F.gelu(gate)


def check(run, x, grad_y):
    ours = run(x, grad_y)
    exact_y, (exact,) = gradients(in_pytorch, [x.double()], grad_y.double())
    torch_y, (torchs,) = gradients(in_pytorch, [x], grad_y)
    assert_close_to_exact(ours[0], exact_y, torch_y, x.dtype, what="y")
    assert_close_to_exact(ours[1], exact, torchs, x.dtype, what="grad_x")


def rows_of(rows, length, dtype, offset=0, gap=0):
    """Random rows in memory that is NaN everywhere else."""
    memory = torch.full((rows * (length + gap) + offset,), float("nan"), dtype=dtype)
    return memory.as_strided((rows, length), (length + gap, 1), offset).copy_(torch.randn(rows, length))


# (rows, D): a single element, odd widths, whole vectors, several tiles across, two rows per thread.
SHAPES = [(1, 1), (5, 3), (7, 77), (1, 5000), (19, 64), (65, 320), (3, 1288), (300, 1), (1100, 1280)]


@in_every_dtype
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_dense_rows_equal_float64(run, rows, columns, dtype):
    check(run, rows_of(rows, 2 * columns, dtype), rows_of(rows, columns, dtype))


@in_every_dtype
@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (0, 5), (8, 8), (8, 0), (0, 16)])
def test_rows_in_larger_memory_are_read_in_place(run, offset, gap, dtype):
    check(run, rows_of(33, 640, dtype, offset, gap), rows_of(33, 320, dtype))
    check(run, rows_of(33, 640, dtype), rows_of(33, 320, dtype, offset, gap))


def test_one_row_of_gradients_serves_every_row(run):
    for dtype in DTYPES:
        check(run, rows_of(9, 640, dtype), rows_of(1, 320, dtype).expand(9, 320))


def test_a_far_negative_gate_keeps_its_digits(run):
    gate = torch.linspace(-12, -1, 4000)
    y, _ = run(torch.cat([torch.ones_like(gate), gate]), torch.ones_like(gate))
    wide = gate.double()
    exact = wide * 0.5 * torch.erfc(-wide / 2**0.5)
    assert ((y / exact - 1).abs() < 4e-7 * (2 + wide * wide)).all()
