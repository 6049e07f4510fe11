"""The CUDA kernels of gradient_norm, run on the host by the emulator, against float64."""

import pytest
import torch

from tests.csrc.emulator import Device
from tests.ops.adamw_batches import in_nan

pytestmark = pytest.mark.compiler


@pytest.fixture
def norm_of(emulator):
    def norm_of(grads, seed=0):
        with emulator.on(Device(), seed):
            return torch.ops.fastdistill.gradient_norm.cuda(grads)

    return norm_of


@pytest.mark.parametrize("offset", [0, 1])
def test_the_norm_of_every_size_and_dtype_equals_float64(norm_of, offset):
    dtypes = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float32)
    grads = [in_nan(torch.randn(n).to(dtype), offset) for dtype in dtypes for n in (1, 7, 0, 8, 4097, 65536, 65543)]
    exact = torch.cat([g.double() for g in grads]).norm()
    assert (norm_of(grads).double() / exact - 1).abs() < 1e-6
    assert torch.equal(norm_of(grads, seed=1), norm_of(grads, seed=2))


def test_more_gradients_than_a_launch_takes(norm_of):
    grads = [torch.full((i % 3,), float(i)) for i in range(430)]
    exact = torch.cat([g.double() for g in grads]).norm()
    assert (norm_of(grads).double() / exact - 1).abs() < 1e-6


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_one_bad_element_shows(norm_of, bad):
    grads = [torch.randn(300), torch.randn(70000)]
    grads[1][66000] = bad
    assert not norm_of(grads).isfinite()


def test_no_elements_have_norm_zero(norm_of):
    assert norm_of([torch.empty(0)]) == 0
