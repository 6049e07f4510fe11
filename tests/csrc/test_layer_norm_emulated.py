"""The CUDA kernels of layer_norm, run on the host by the emulator, against float64.

tests/ops/test_layer_norm.py covers the op on every backend, where there is a GPU.
"""

import pytest
import torch
import torch.nn.functional as F

from tests.csrc.emulator import Device
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import in_every_dtype

pytestmark = pytest.mark.compiler

OPS = torch.ops.fastdistill
NAMES = ("y", "s", "grad_x", "grad_weight", "grad_bias")
# Few multiprocessors, so that a block of the backward has several rows.
SMALL = Device(multiprocessors=2)


def in_pytorch(x, residual, weight, bias, grad_y, grad_s, dtype):
    x, residual, weight, bias, grad_y, grad_s = (
        None if t is None else t.to(dtype) for t in (x, residual, weight, bias, grad_y, grad_s)
    )
    s = (x if residual is None else x + residual).detach().requires_grad_()
    weight, bias = (None if t is None else t.detach().requires_grad_() for t in (weight, bias))
    y = F.layer_norm(s, s.shape[-1:], weight, bias)
    wanted = [t for t in (s, weight, bias) if t is not None]
    found = iter(torch.autograd.grad(y, wanted, grad_y))
    grad_x, *rest = (None if t is None else next(found) for t in (s, weight, bias))
    grads = [grad_x if grad_s is None else grad_x + grad_s, *rest]
    return y.detach(), s.detach(), *grads


def run(emulator, x, residual, weight, bias, grad_y, grad_s, device=SMALL, seed=0):
    """As NAMES; what is allocated is full of NaN before."""
    with emulator.on(device, seed):
        y, s, mean, rstd = OPS.layer_norm.cuda(x, residual, weight, bias, 1e-5)
        s = x if residual is None else s
        parameters = weight is not None or bias is not None
        grads = OPS.layer_norm_backward.cuda(grad_y, grad_s, s, weight, mean, rstd, parameters)
    return y, s, grads[0], *(g if p is not None else None for g, p in zip(grads[1:], (weight, bias)))


def check(emulator, x, residual, weight, bias, grad_y, grad_s, **settings):
    ours = run(emulator, x, residual, weight, bias, grad_y, grad_s)
    # Of the sum as it is rounded, which is what the op norms.
    s = x if residual is None else x + residual
    exact = in_pytorch(s, None, weight, bias, grad_y, grad_s, torch.float64)
    torchs = in_pytorch(s, None, weight, bias, grad_y, grad_s, x.dtype)
    in_float32 = in_pytorch(s, None, weight, bias, grad_y, grad_s, torch.float32)
    for i, name in enumerate(NAMES):
        if ours[i] is not None:
            per_column = name in ("grad_weight", "grad_bias")
            theirs, dtype = (in_float32[i], torch.float32) if per_column else (torchs[i], x.dtype)
            assert ours[i].dtype == dtype, name
            assert_close_to_exact(ours[i], exact[i], theirs, dtype, what=name, **settings)


def rows_of(rows, columns, dtype, offset=0, gap=0, mean=0.0, std=1.0):
    """Random rows in memory that is NaN everywhere else."""
    memory = torch.full((rows * (columns + gap) + offset,), float("nan"), dtype=dtype)
    return memory.as_strided((rows, columns), (columns + gap, 1), offset).copy_(torch.randn(rows, columns) * std + mean)


def inputs(rows, columns, dtype, residual=True, **settings):
    x = rows_of(rows, columns, dtype, **settings)
    weight, bias = (torch.randn(columns) + 1).to(dtype), torch.randn(columns)
    grad_y, grad_s = rows_of(rows, columns, dtype), rows_of(rows, columns, dtype)
    return x, rows_of(rows, columns, dtype) if residual else None, weight, bias, grad_y, grad_s if residual else None


# (rows, D): a warp per row in each of its sizes, a block per row, a row walked in a loop, no vectors, one element.
SHAPES = [(13, 320), (9, 640), (5, 1280), (3, 2048), (2, 5120), (2, 10240), (3, 5001), (7, 77), (5, 3), (4, 1)]


@in_every_dtype
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_every_way_through_a_row_equals_float64(emulator, rows, columns, residual, dtype):
    check(emulator, *inputs(rows, columns, dtype, residual))


@in_every_dtype
@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (0, 5), (8, 8), (0, 16)])
def test_rows_in_larger_memory_are_read_in_place(emulator, offset, gap, dtype):
    x, residual, weight, bias, _, grad_s = inputs(9, 320, dtype, offset=offset, gap=gap)
    check(emulator, x, residual, weight, bias, rows_of(9, 320, dtype, offset, gap), grad_s)
    check(emulator, residual, x, weight, bias, rows_of(1, 320, dtype).expand(9, 320), grad_s)


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias"), ("grad_s",)])
def test_optional_tensors_can_be_left_out(emulator, absent):
    named = dict(zip(("x", "residual", "weight", "bias", "grad_y", "grad_s"), inputs(7, 320, torch.bfloat16)))
    check(emulator, **{name: None if name in absent else t for name, t in named.items()})


@pytest.mark.parametrize("columns", [320, 2048, 10240])
def test_a_mean_far_above_the_deviation_keeps_its_digits(emulator, columns):
    tensors = inputs(3, columns, torch.float32, residual=False, mean=100.0, std=0.01)
    check(emulator, *tensors, large_mean=True)


def test_the_order_of_threads_and_blocks_does_not_matter(emulator):
    tensors = inputs(29, 640, torch.float16)
    first, *others = (run(emulator, *tensors, seed=seed) for seed in range(3))
    for other in others:
        for name, a, b in zip(NAMES, first, other):
            assert torch.equal(a, b), name


def test_more_rows_than_resident_blocks_are_walked_in_turns(emulator):
    with emulator.on(SMALL):
        emulator.launches()
    check(emulator, *inputs(150, 640, torch.bfloat16))
    assert any(line.startswith("plain") for line in emulator.launches())
