"""The CUDA kernels of adversarial_loss, run on the host by the emulator, against the reference in float64.

tests/ops/test_adversarial_loss.py covers the op on every backend, where there is a GPU.
"""

import pytest
import torch

from fastdistill.ops.adversarial_loss import FUNCTIONS, reference
from tests.csrc.emulator import Device
from tests.ops.accuracy import assert_close_to_exact

pytestmark = pytest.mark.compiler

# Fewer multiprocessors than pieces; none that could wait; a barrier that has no room.
DEVICES = {
    "waiting": Device(multiprocessors=3),
    "alone": Device(cooperative=0),
    "no room": Device(multiprocessors=3, cooperative=2),
}


def make(dtype, seed=0):
    """Heads of one logit, of none, of odd sizes, of several pieces, and one that starts an element late; mixed up."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: (3 * torch.randn(shape, generator=generator)).to(dtype)  # noqa: E731
    late = torch.full((4106,), float("nan"), dtype=dtype)[1:4104]
    return [random(8, 1, 197), random(), late.copy_(random(4103)), random(0, 3), random(9001), random(5).float()]


def check(emulator, device, logits, ups, function):
    weight = 1 / ups
    seed = torch.tensor(1.7)
    with emulator.on(device):
        loss, statistics = torch.ops.fastdistill.adversarial_loss.cuda(logits, ups, function, weight)
        grads = torch.ops.fastdistill.adversarial_loss_backward.cuda(seed, logits, ups, function, weight)
    exact, torchs = {}, {}
    for found, dtype in ((exact, torch.float64), (torchs, torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in logits]
        found["loss"], found["statistics"] = reference(leaves, ups, function, weight)
        found["grads"] = torch.autograd.grad(1.7 * found["loss"], leaves)
    for name, ours in (("loss", loss), ("statistics", statistics)):
        assert_close_to_exact(ours, exact[name].detach(), torchs[name].detach(), torch.float32, what=name)
    for t, ours, a, b in zip(logits, grads, exact["grads"], torchs["grads"], strict=True):
        scale = a.abs().max().clamp(min=1e-30) if a.numel() else 1.0
        assert_close_to_exact(ours.double() / scale, a / scale, b.to(t.dtype).double() / scale, t.dtype, what="grad")
    return loss, statistics, *grads


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_losses_and_gradients_equal_float64_on_every_device(emulator, device, function, dtype):
    check(emulator, DEVICES[device], make(dtype), 3, function)


def test_all_heads_are_one_launch_each_way(emulator):
    emulator.launches()
    check(emulator, DEVICES["waiting"], make(torch.float16), 3, "hinge")
    assert emulator.launches() == ["cooperative 3 x 256", "plain 8 x 256"]
    check(emulator, DEVICES["alone"], make(torch.float16), 3, "hinge")
    assert emulator.launches() == ["plain 1 x 256", "plain 8 x 256"]


def test_more_heads_than_parameters_hold_take_more_launches(emulator):
    logits = [torch.randn(1 + i % 5) for i in range(150)]
    emulator.launches()
    check(emulator, DEVICES["waiting"], logits, 75, "softplus")
    assert len(emulator.launches()) == 6


def test_heads_that_are_all_empty_give_zero(emulator):
    check(emulator, DEVICES["waiting"], [torch.zeros(0), torch.zeros(2, 0)], 1, "hinge")


def test_the_order_of_blocks_and_the_device_do_not_change_a_bit(emulator):
    logits, results = make(torch.float32), []
    for device, seed in (("waiting", 0), ("waiting", 1), ("alone", 2)):
        with emulator.on(DEVICES[device], seed=seed):
            results.append(torch.ops.fastdistill.adversarial_loss.cuda(logits, 3, "softplus", 1.0))
    for loss, statistics in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(statistics, results[0][1])
