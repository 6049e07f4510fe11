"""Other people's implementations of an op, where they can be imported. One that cannot is a row that says so."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from .benchmark import Inputs, Provider


def peer(name: str, module: str, call: Callable[[ModuleType], Callable[..., object]], note: str = "") -> Provider:
    """`call(module)` is the function with the op's own arguments; `module` is imported when it is first asked for."""

    def missing(inputs: Inputs) -> list[str]:
        device = next(iter(inputs.tensors.values())).device.type
        if device != "cuda":
            return [f"needs a CUDA tensor, got {device}"]
        try:
            call(importlib.import_module(module))
        except Exception as error:  # whatever a package of someone else's raises while it is imported
            return [f"{module} cannot be used: {type(error).__name__}: {' '.join(str(error).split())}"]
        return []

    return Provider(name, lambda _: call(importlib.import_module(module)), missing, peer=True, note=note)
