"""The CUDA kernels of lpips_distance, run on the host by the emulator, against float64.

tests/ops/test_lpips_distance.py covers the op on every backend, where there is a GPU.
"""

import pytest
import torch

from fastdistill.ops.lpips_distance import reference
from tests.csrc.emulator import Device
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import in_every_dtype

pytestmark = pytest.mark.compiler


@pytest.fixture
def run(emulator):
    """(distance, grad_x, grad_y, grad_weight); what is allocated is full of NaN before."""

    def run(x, y, weight, grad, asked=(True, True, True)):
        with emulator.on(Device()):
            return (
                torch.ops.fastdistill.lpips_distance.cuda(x, y, weight),
                *torch.ops.fastdistill.lpips_distance_backward.cuda(grad, x, y, weight, *asked),
            )

    return run


def in_float64(x, y, weight, grad):
    leaves = [t.double().requires_grad_() for t in (x, y, weight)]
    distance = reference(*leaves)
    return distance.detach(), *torch.autograd.grad(distance, leaves, grad.double())


def check(run, x, y):
    weight, grad = torch.rand(x.shape[1]), torch.randn(x.shape[0])
    for i, (ours, exact) in enumerate(zip(run(x, y, weight, grad), in_float64(x, y, weight, grad))):
        assert_close_to_exact(ours, exact, exact, x.dtype if i in (1, 2) else torch.float32, what=f"result {i}")


def image(shape, dtype, layout, offset=0):
    """Random features in memory that is NaN everywhere else."""
    memory = torch.full((torch.Size(shape).numel() + offset,), float("nan"), dtype=dtype)[offset:]
    t = memory.view(shape) if layout == "c" else memory.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return t.copy_(torch.randn(shape))


# One value; odd sizes without vectors; whole vectors, with pixels and channels left over of a block.
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 7), (2, 24, 4, 10), (1, 320, 6, 4)]


@in_every_dtype
@pytest.mark.parametrize("layouts", ["cc", "ll", "cl"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_distance_and_gradients_equal_float64(run, shape, layouts, dtype):
    check(run, *(image(shape, dtype, layout) for layout in layouts))


def test_many_pixels_are_taken_in_runs_of_a_line(run):
    check(run, *(image((132, 3, 72), torch.bfloat16, "c") for _ in range(2)))


@pytest.mark.parametrize("layout", ["c", "l"])
def test_a_view_that_starts_one_element_late_is_read_right(run, layout):
    shape = (2, 16, 8, 4)
    check(run, image(shape, torch.bfloat16, layout, 1), image(shape, torch.bfloat16, layout))


@pytest.mark.parametrize("layout", ["c", "l"])
def test_a_gradient_that_is_not_asked_for_changes_no_other(run, layout):
    x, y = (image((2, 16, 8, 9), torch.float32, layout) for _ in range(2))
    weight, grad = torch.rand(16), torch.randn(2)
    every = run(x, y, weight, grad)
    for asked in ((True, False, False), (False, True, False), (False, False, True)):
        for made, of, wanted in zip(run(x, y, weight, grad, asked)[1:], every[1:], asked):
            assert torch.equal(made, of) if wanted else made.numel() == 0


@pytest.mark.parametrize("layout", ["c", "l"])
def test_equal_features_give_0_and_vectors_of_zeros_no_gradient(run, layout):
    x = image((1, 16, 5, 8), torch.float32, layout)
    x[0, :, 2, 3] = 0
    results = run(x, x.clone(), torch.rand(16), torch.ones(1))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in results)
    distance, grad_x, _, _ = run(x, image((1, 16, 5, 8), torch.float32, layout), torch.rand(16), torch.ones(1))
    assert distance.isfinite().all()
    assert not grad_x[0, :, 2, 3].any()
