"""Providers that every op has: its own backends, read from the registry, and plain or compiled PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fastdistill.ops import _dispatch, explain

from .benchmark import Inputs, Provider


def backends(op: str, function: Callable[..., object]) -> tuple[Provider, ...]:
    """One provider per backend in the op's registry; what it cannot serve, it says in the registry's own words."""
    return tuple(_backend(op, function, record) for record in _dispatch.ops()[op].backends)


def kernel_names(op: str) -> tuple[str, ...]:
    """The backends that are kernels: all but the reference."""
    return tuple(record.name for record in _dispatch.ops()[op].backends if record.name != _dispatch.REFERENCE)


def _backend(op: str, function: Callable[..., object], record: _dispatch.Backend) -> Provider:
    def prepare(inputs: Inputs) -> Callable[..., object]:
        # The first choice is called as users call it: the time it takes to choose is part of its time. Where that
        # depends on the call (whether it needs a gradient, say), what is measured must be said.
        if (
            _dispatch.ops()[op].preferred is None
            and explain(op, **inputs.tensors, **inputs.constants).backend == record.name
        ):
            return function
        return functools.partial(function, backend=record.name)

    return Provider(record.name, prepare, lambda inputs: record.supports(**inputs.tensors, **inputs.constants))


def eager(name: str, function: Callable[..., object]) -> Provider:
    """A plain function."""
    return Provider(name, lambda _: function)


def other_layout(name: str, function: Callable[..., object], convert: Callable[[Inputs], Inputs]) -> Provider:
    """A plain function on inputs that lie in the other layout: what a model that lives in that layout gets."""
    return Provider(name, lambda _: function, adapt=convert)


def compiled(name: str, function: Callable[..., object]) -> Provider:
    """`torch.compile(function)`, compiled anew for each row: torch would stop compiling after a few shapes."""

    def prepare(_: Inputs) -> Callable[..., object]:
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, dynamic=False)

    return Provider(name, prepare, lambda inputs: _compile_reasons(_device(inputs)), compiled=True)


@functools.cache
def _compile_reasons(device: torch.device) -> list[str]:
    """Whether a machine can compile (it takes a C++ compiler, headers, a writable cache) shows when it tries."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(2, device=device))
    except Exception as error:
        return [f"torch.compile fails here: {type(error).__name__}: {str(error).strip().splitlines()[0]}"]
    return []


def _device(inputs: Inputs) -> torch.device:
    return next(iter(inputs.tensors.values())).device
