"""A small network with what matters to an optimiser: one-element, odd, large and channels-last parameters."""

import torch
from torch import nn


def network(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 17, 3), nn.Conv2d(17, 9, 1), nn.Linear(77, 65), nn.Linear(5, 1))
    net[0].to(memory_format=torch.channels_last)
    return net.to(dtype)


def two_groups(net):
    params = list(net.parameters())
    return [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.3, "maximize": True}]


def averages(net):
    return [p.detach().clone().to(torch.promote_types(p.dtype, torch.float32)) for p in net.parameters()]


def gradients_like(net, step, *, absent=False):
    """Drawn from `step`, some steps' a hundred times larger; None for every third parameter where `absent`."""
    generator = torch.Generator().manual_seed(step)
    size = 10.0 ** (-2 * (step % 2))
    drawn = [torch.randn(p.shape, generator=generator) * size for p in net.parameters()]
    return [None if absent and i % 3 == 2 else g for i, g in enumerate(drawn)]


def set_gradients(net, gradients):
    for p, g in zip(net.parameters(), gradients):
        p.grad = None if g is None else torch.empty_like(p).copy_(g)


def assert_same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs):
        a, b = a.detach(), b.detach()
        assert ((a - b).abs() <= tolerance * (b.abs() + b.abs().max().clamp(min=1e-3))).all()
