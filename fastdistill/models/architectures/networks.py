"""The networks of an architecture, made without drawing their weights."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..loading import ModelError, one_line, quiet_libraries
from .architecture import Architecture, Component

if TYPE_CHECKING:
    import torch
    from torch import nn


def build_networks(
    architecture: Architecture, dtype: torch.dtype, parts: Collection[str] | None = None
) -> dict[str, nn.Module]:
    """The networks by name, in eval mode, their weights whatever the memory held.

    Made on torch's current device, so `with torch.device("meta")` they take no memory, and under a `FakeTensorMode`
    neither, but compute: SDXL's UNet takes a third of a second of one core. Torch's default dtype is changed meanwhile:
    other threads must not create tensors.

    Args:
        parts: keys of `architecture.networks` to build; None builds all.

    Raises:
        ModelError: a class or a setting that diffusers or transformers do not know, in a folder's configuration.
    """
    wanted = architecture.networks if parts is None else {name: architecture.networks[name] for name in parts}
    with quiet_libraries(), _default_dtype(dtype), _without_draws():
        return {name: _build(architecture, name, component).eval() for name, component in wanted.items()}


def _build(architecture: Architecture, name: str, component: Component) -> nn.Module:
    try:
        network = getattr(importlib.import_module(component.library), component.class_name)
        if component.library == "diffusers":
            return network.from_config(dict(component.config))
        return network(network.config_class(**component.config))
    except Exception as error:  # each library has its own for a setting that it does not take
        raise ModelError(f"{architecture.name}: {name} cannot be built: {one_line(error)}") from error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _without_draws() -> Iterator[None]:
    """Initialisers leave memory as it is: most of the time that a constructor takes, and its use of the generators."""
    from torch.overrides import TorchFunctionMode

    class WithoutDraws(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            # Tensor's own and those of torch.nn.init, kaiming_uniform_ and the like.
            if getattr(function, "__name__", "").endswith(("normal_", "uniform_")):
                return args[0] if args else kwargs["tensor"]
            return function(*args, **kwargs)

    with WithoutDraws():
        yield
