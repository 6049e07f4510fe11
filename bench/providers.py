"""Providers that every op has: its own backends, read from the registry, and plain or compiled PyTorch."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import torch

from fastdistill.bench.benchmark import Inputs, Provider
from fastdistill.ops import _dispatch, explain


def backends(op: str, function: Callable[..., object]) -> tuple[Provider, ...]:
    """One provider per backend in the op's registry; what it cannot serve, it says in the registry's own words."""
    return tuple(_backend(op, function, record) for record in _dispatch.ops()[op].backends)


def kernel_names(op: str) -> tuple[str, ...]:
    """The backends that are kernels: all but the reference."""
    return tuple(record.name for record in _dispatch.ops()[op].backends if record.name != _dispatch.REFERENCE)


def _backend(op: str, function: Callable[..., object], record: _dispatch.Backend) -> Provider:
    def prepare(inputs: Inputs) -> Callable[..., object]:
        # The first choice is called as users call it: the time it takes to choose is part of its time.
        if explain(op, **inputs.tensors, **inputs.constants).backend == record.name:
            return function
        return functools.partial(function, backend=record.name)

    return Provider(record.name, prepare, lambda inputs: record.supports(**inputs.tensors, **inputs.constants))


def eager(name: str, function: Callable[..., object]) -> Provider:
    """A plain function."""
    return Provider(name, lambda _: function)


def compiled(name: str, function: Callable[..., object]) -> Provider:
    """`torch.compile(function)`, compiled anew for each row: torch would stop compiling after a few shapes."""

    def prepare(_: Inputs) -> Callable[..., object]:
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, dynamic=False)

    return Provider(name, prepare, _compile_reasons)


def _compile_reasons(inputs: Inputs) -> list[str]:
    on_cpu = next(iter(inputs.tensors.values())).device.type == "cpu"
    if on_cpu and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return ["torch.compile on the CPU needs a C++ compiler on PATH"]
    return []
