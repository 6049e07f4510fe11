"""The CUDA kernels of weighted_squared_error, run on the host by the emulator, against float64.

tests/ops/test_weighted_squared_error.py covers the op on every backend, where there is a GPU.
"""

import itertools

import pytest
import torch

from fastdistill.ops.weighted_squared_error import reference, reference_gradient
from tests.csrc.emulator import Device
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import DTYPES

pytestmark = pytest.mark.compiler

GRAD = torch.tensor(1.7)


def samples_of(batch, length, dtype, offset=0, gap=0):
    """Random samples in memory that is NaN everywhere else."""
    memory = torch.full((batch * (length + gap) + offset,), float("nan"), dtype=dtype)
    return memory.as_strided((batch, length), (length + gap, 1), offset).copy_(torch.randn(batch, length))


def split(scale):
    return (scale, 1.0) if isinstance(scale, torch.Tensor) else (None, scale)


def run(emulator, device, x, a, b, *scales, seed=0):
    tensors, values = zip(*map(split, scales))
    with emulator.on(device, seed):
        emulator.launches()
        loss = torch.ops.fastdistill.weighted_squared_error.cuda(x, a, b, *tensors, *values)
        launches = emulator.launches()
        call = (GRAD, x, a, b, *tensors, *values)
        return loss, torch.ops.fastdistill.weighted_squared_error_backward.cuda(*call), launches


def check(emulator, x, a, b, *scales, device=Device()):  # noqa: B008
    loss, grad, launches = run(emulator, device, x, a, b, *scales)
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in (x, a, b, *scales)]
    torchs = reference(x, a, b, *scales), reference_gradient(GRAD, x, a, b, *scales)
    assert_close_to_exact(loss, reference(*wide), torchs[0], torch.float32, what="loss")
    # The gradient shrinks with the number of elements: it is held to the rule at the size of x.
    exact = reference_gradient(GRAD.double(), *wide)
    unit = exact.abs().max().item() or 1.0
    assert grad.dtype == x.dtype
    assert_close_to_exact(grad.double() / unit, exact / unit, torchs[1].double() / unit, x.dtype, what="gradient")
    return launches


def per_sample(batch):
    return torch.randn(batch), torch.randn(batch), torch.rand(batch)


@pytest.mark.parametrize(("of_x", "of_target"), [*itertools.product(DTYPES, DTYPES)], ids=lambda d: str(d)[6:])
def test_every_pair_of_dtypes_equals_float64(emulator, of_x, of_target):
    for length in (77, 520):
        x, a, b = (samples_of(3, length, dtype) for dtype in (of_x, of_target, of_target))
        check(emulator, x, a, b, *per_sample(3))
        check(emulator, x, a, None, 0.7, 1.0, -1.3)


# One element; odd lengths; many small samples in a block; one cluster; several blocks per sample and two launches.
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (5, 3), (700, 2), (3, 12285), (2, 16384), (4500, 5)])
def test_every_shape_equals_float64(emulator, batch, length):
    x, a, b = (samples_of(batch, length, torch.float32) for _ in range(3))
    check(emulator, x, a, b, *per_sample(batch))


@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (0, 5), (8, 8), (0, 16)])
def test_samples_in_larger_memory_are_read_in_place(emulator, offset, gap):
    for dtype in (torch.float32, torch.bfloat16):
        own, far = samples_of(3, 320, dtype), samples_of(3, 320, dtype, offset, gap)
        check(emulator, own, far, far + 1, *per_sample(3))
        check(emulator, far, own, None, 1.0, 1.0, torch.rand(3))


def test_one_cluster_takes_one_launch_and_more_blocks_take_two(emulator):
    scales = (1.0, 1.0, torch.rand(1).expand(2))
    x, a = (samples_of(2, 16384, torch.float32) for _ in range(2))
    assert check(emulator, x, a, None, *scales) == ["cluster of 8 8 x 512"]
    launches = check(emulator, x, a, None, *scales, device=Device(clusters=False))
    assert len(launches) == 2, launches
    assert all(line.startswith("plain") for line in launches), launches
    assert len(check(emulator, x[:, :500], a[:, :500], None, *scales, device=Device(clusters=False))) == 1


def test_the_order_of_threads_and_blocks_does_not_matter(emulator):
    for device in (Device(), Device(clusters=False)):
        x, a, b = (samples_of(3, 12285, torch.bfloat16) for _ in range(3))
        scales = per_sample(3)
        loss, grad, _ = run(emulator, device, x, a, b, *scales)
        other_loss, other_grad, _ = run(emulator, device, x, a, b, *scales, seed=7)
        assert torch.equal(loss, other_loss)
        assert torch.equal(grad, other_grad)
