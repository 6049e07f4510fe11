"""The CUDA kernel of squared_norm, run on the host by the emulator, against the reference in float64.

tests/ops/test_squared_norm.py covers the op on every backend, where there is a GPU.
"""

import pytest
import torch

from fastdistill.ops.squared_norm import reference
from tests.csrc.emulator import Device
from tests.ops.accuracy import assert_close_to_exact

pytestmark = pytest.mark.compiler

DEVICES = {
    "waiting": Device(multiprocessors=3),
    "alone": Device(cooperative=0),
    "no room": Device(multiprocessors=3, cooperative=2),
}


def make(batch, dtype):
    """Images, values, no elements, several pieces; samples that lie in larger ones or start an element late."""
    late = torch.full((batch * 65 + 1,), float("nan"), dtype=dtype)[1:].view(batch, 65)
    larger = torch.full((batch, 80), float("nan"), dtype=dtype)[:, 8:72]
    return [
        torch.randn(batch, 3, 7, 5).to(dtype, memory_format=torch.channels_last),
        torch.randn(batch).to(dtype),
        torch.zeros(batch, 0, dtype=dtype),
        torch.randn(batch, 9001).to(dtype),
        late.copy_(torch.randn(batch, 65)),
        larger.copy_(torch.randn(batch, 64)),
        torch.randn(batch, 33),
    ]


def check(emulator, device, tensors, seed=0):
    with emulator.on(device, seed=seed):
        found = torch.ops.fastdistill.squared_norm.cuda(tensors)
    exact, torchs = reference([t.double() for t in tensors]), reference(tensors)
    assert_close_to_exact(found, exact, torchs, torch.float32)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_norms_equal_float64_on_every_device(emulator, device, batch, dtype):
    check(emulator, DEVICES[device], make(batch, dtype))


def test_all_tensors_are_one_launch_and_more_than_parameters_hold_are_more(emulator):
    emulator.launches()
    check(emulator, DEVICES["waiting"], make(4, torch.float16))
    assert emulator.launches() == ["cooperative 3 x 256"]
    check(emulator, DEVICES["waiting"], [torch.randn(3, 1 + i % 7) for i in range(150)])
    assert len(emulator.launches()) == 3


def test_no_elements_at_all_give_zero(emulator):
    assert check(emulator, DEVICES["waiting"], [torch.zeros(3, 0)]).tolist() == [0.0, 0.0, 0.0]


def test_the_order_of_blocks_and_the_device_do_not_change_a_bit(emulator):
    tensors = make(4, torch.float32)
    results = [
        check(emulator, DEVICES[name], tensors, seed) for name, seed in (("waiting", 0), ("waiting", 1), ("alone", 2))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
