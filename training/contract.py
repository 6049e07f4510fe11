"""The gradient contract: a loss moves its own role and nobody else.

Most public re-implementations that "train" without learning break it silently: the student's sample made under
no_grad, a teacher or a discriminator left trainable in the student's turn. So it is checked before every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastdistill.optim.shards import local


class GradientContractError(RuntimeError):
    """A loss gives its own role no gradient, or another role one."""


def check_gradient_contract(
    roles: Mapping[str, nn.Module],
    losses: Mapping[str, tuple[str, Callable[[], Tensor]]],
    *,
    flat: bool = False,
    anywhere: Callable[[bool], bool] = bool,
) -> None:
    """Run each loss alone and see whom it would move.

    Args:
        roles: name to network.
        losses: name to (the role that this loss trains, a function that computes it, a scalar).
        flat: a gradient of zero is no violation: of roles that have trained, a hinge may have nothing left to say.
        anywhere: whether any process of the run finds so (`World.any`): each has samples of its own.

    Raises:
        GradientContractError: naming loss and role, where the own role's gradient is missing, zero or not finite, or
            where any parameter of another role has one (even a zero: the graph reached it).
    """
    for loss_name, (owner, compute) in losses.items():
        _clear(roles)
        loss = compute()
        if not loss.requires_grad:
            raise GradientContractError(
                f"loss {loss_name!r} gives no gradient to anything, {owner!r} included: was its sample made under "
                "no_grad, or detached?"
            )
        loss.backward()
        for role, network in roles.items():
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            if role != owner and gradients:
                raise GradientContractError(
                    f"loss {loss_name!r} must train {owner!r} alone, but {len(gradients)} parameters of {role!r} "
                    "received a gradient: run it under no_grad or detach what it is given"
                )
            parts = [local(g) for g in gradients]
            if role == owner and not flat and not anywhere(any(bool(part.any()) for part in parts)):
                raise GradientContractError(f"loss {loss_name!r} must train {owner!r}, but its gradient is zero")
            if role == owner and anywhere(not all(bool(part.isfinite().all()) for part in parts)):
                raise GradientContractError(f"loss {loss_name!r}: the gradient of {owner!r} is not finite")
    _clear(roles)


@contextmanager
def nudged(network: nn.Module, relative: float = 1e-2, seed: int = 0):
    """Within the block, every parameter is off by `relative` of its own size; afterwards it is exactly as before.

    A fake score that starts as a copy of the teacher gives a DMD gradient of exactly zero, which a contract check
    could not tell from a missing one.
    """
    parts = [local(p) for p in network.parameters()]
    kept = [part.clone() for part in parts]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for p in parts:
                mean = p.abs().mean()
                scale = torch.where(mean == 0, 1.0, mean + 1e-3)  # the second factor of an adapter starts at zero
                p += relative * scale * torch.randn(p.shape, generator=generator).to(p)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parts, kept, strict=True):
                p.copy_(value)


def _clear(roles: Mapping[str, nn.Module]) -> None:
    for network in roles.values():
        network.zero_grad(set_to_none=True)
