"""Networks without memory: fake tensors in place of weights, and what is made of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SMALL = 4096
"""Elements up to which a tensor that is made is real: schedules and timesteps, whose values decide what is computed."""

Module = TypeVar("Module", bound=nn.Module)


class Weightless(TorchDispatchMode):
    """Use as a context: whatever is made from nothing within it, and is not small, is fake.

    Fake tensors know shape, dtype and strides; they take no memory, and what is computed from them is fake too. What is
    small stays real, so that code which looks at values (a schedule's end, a number drawn) runs as it is.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        with self._fake:
            made = function(*args, **kwargs)
        return made if isinstance(made, Tensor) and made.numel() > SMALL else function(*args, **kwargs)


@contextmanager
def converted_in_place() -> Iterator[None]:
    """Within, `Module.to` and its like set the data of parameters, fake ones too, and deep copies do not warn of them.

    torch swaps those with new ones, which it refuses while anything refers to one weakly, as their own mode does.
    """
    before = nn.Module._apply
    nn.Module._apply = _apply
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield
    finally:
        nn.Module._apply = before


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    for child in module.children() if recurse else ():
        child._apply(function)
    with torch.no_grad():
        for p in module._parameters.values():
            if p is not None and (made := function(p)) is not p:
                p.data = made
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return module


def fake_mode() -> FakeTensorMode:
    """That fake tensors of one simulation share; real ones may be mixed in."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_like(fake: FakeTensorMode, t: Tensor) -> Tensor:
    """On the CPU, whatever device `t` is on: what it stands for is said elsewhere."""
    with fake:
        made = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype)
    if isinstance(t, nn.Parameter):
        return nn.Parameter(made, requires_grad=t.requires_grad)
    return made


def fake_copy(fake: FakeTensorMode, module: Module) -> Module:
    """A deep copy whose parameters and buffers are fake, but for small buffers."""
    memo: dict[int, Any] = {id(p): fake_like(fake, p) for p in module.parameters()}
    memo |= {id(b): fake_like(fake, b) for b in module.buffers() if b.numel() > SMALL or b.is_meta}
    return copy.deepcopy(module, memo)
