"""Remembered shapes: the same count as op by op."""

import torch
from fastdistill.training.memory import TensorMemory
from fastdistill.training.simulation.fakes import Weightless, fake_copy, fake_mode
from fastdistill.training.simulation.gpu_autocast import gpu_autocast
from fastdistill.training.simulation.shapes import FakeMemory
from torch import nn


def network():
    norm = nn.GroupNorm(4, 16)
    return nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), norm, nn.SiLU(), nn.Flatten(), nn.Linear(16 * 64, 8))


def updated(memory, model, x):
    memory.add(model.parameters())
    with memory:
        for _ in range(2):
            model(x).square().mean().backward()
            model.zero_grad(set_to_none=True)
    return memory.peak, memory.now


def test_remembered_shapes_count_what_every_op_says_for_itself():
    fake, real = fake_mode(), network()
    x = torch.randn(32, 4, 8, 8)
    model = fake_copy(fake, real)
    expected = updated(TensorMemory(), model, x)
    assert updated(FakeMemory(fake), model, x) == expected
    assert updated(FakeMemory(fake), model, x) == expected  # all of them remembered
    assert expected[0] == updated(TensorMemory(), real, x)[0]


def test_what_is_small_is_real_and_what_is_large_has_no_values():
    fake = fake_mode()
    with Weightless(fake):
        small, large = torch.linspace(0, 1, 1000), torch.randn(10**9, 100)
    assert float(small[-1]) == 1.0
    assert large.shape == (10**9, 100)
    assert (large + small[0]).nbytes == 4 * 10**11


def test_a_gpus_autocast_keeps_norms_in_float32_and_products_in_16_bits():
    x, model = torch.randn(2, 4, 8, 8), network()

    def dtypes():
        found = []
        for layer in model:
            layer.register_forward_hook(lambda _m, _x, y: found.append(y.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        return found[:2]

    assert dtypes() == [torch.bfloat16, torch.bfloat16]
    with gpu_autocast("cuda"):
        assert dtypes() == [torch.bfloat16, torch.float32]
