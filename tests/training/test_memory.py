"""Memory of tensors, counted op by op."""

import torch
from fastdistill.training.memory import TensorMemory
from torch._subclasses import FakeTensorMode
from torch.nn.functional import linear

KIB = 1024


def test_the_peak_counts_what_lives_at_once_and_what_is_freed_is_gone():
    with TensorMemory() as memory:
        a = torch.zeros(256)  # 1 KiB
        b = a + 1
        del a
        c = b * 2
        d = c.view(16, 16)
        del c
    assert memory.peak == 2 * KIB
    assert memory.now == 2 * KIB
    del b
    assert memory.now == KIB
    del d
    assert memory.now == 0


def test_a_storage_counts_once_however_many_tensors_see_it():
    weight = torch.zeros(256)
    memory = TensorMemory()
    memory.add([weight, weight[:10], weight.view(2, 128)])
    with memory:
        weight.mul_(2)
    assert memory.peak == KIB


def test_fake_tensors_give_the_figures_of_real_ones():
    def update():
        weight = torch.zeros(64, 64, requires_grad=True)
        with TensorMemory() as memory:
            memory.add([weight])
            x = torch.ones(32, 64)
            linear(linear(x, weight).relu(), weight).square().mean().backward()
        return memory.peak, memory.now

    real = update()
    with FakeTensorMode():
        fake = update()
    assert fake == real
    assert real[0] > 2 * 64 * 64 * 4  # weight and gradient at least
