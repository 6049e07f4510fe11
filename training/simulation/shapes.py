"""Ops on fake tensors, answered from memory: the same op on the same shapes gives the same shapes.

`FakeTensorMode` has such a cache too, whose keys take longer than the rest of an op. Networks repeat few different ops
thousands of times, so that a whole update of SDXL takes seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from ..memory import TensorMemory
from ..memory_plan import LiveTensor

_CPU, _META = torch.device("cpu"), torch.device("meta")
# Of ops on shapes, whatever is planned.
_SHAPES: dict[tuple, Any] = {}
_KINDS: dict[Any, str] = {}
_DEVICE = torch.ops.prim.device.default


class FakeMemory(TensorMemory):
    """`TensorMemory` of what is computed with the fake tensors of a mode, all of them on the CPU.

    Attributes:
        resident: bytes that were there when counting started.
        gradients_at_peak: bytes of the gradients that were there at the highest point.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake
        self._gradients: dict[int, int] = {}
        self._gradient_bytes = 0
        self.resident = self.gradients_at_peak = 0
        self._look_at: int | None = None
        self._labels: dict[int, LiveTensor] = {}
        self._function: Any = None
        self.live: list[LiveTensor] = []

    def start(self, resident: int) -> None:
        """Count from here on; what is there now is `resident` bytes, more than was added one by one."""
        self.now = self.resident = resident
        self.restart()

    def restart(self) -> None:
        """Forget the highest point."""
        self.peak, self.gradients_at_peak = self.now, self._gradient_bytes

    def rose(self, t: Tensor) -> None:
        super().rose(t)
        self.gradients_at_peak = self._gradient_bytes

    def look_at(self, point: int | None) -> None:
        """From here on, note in `live` which tensors there are when their bytes first reach `point`; None stops it."""
        self._look_at, self.live = point, []

    def _count(self, t: Tensor) -> None:
        if self._look_at is not None:
            storage = t.untyped_storage()
            if storage._cdata not in self._known:
                name = "resident" if self._function is None else str(self._function)
                dtype = str(t.dtype).removeprefix("torch.")
                self._labels[storage._cdata] = LiveTensor(storage.nbytes(), tuple(t.shape), dtype, name)
        super()._count(t)
        if self._look_at is not None and not self.live and self.now >= self._look_at:
            self.live = [self._labels[key] for key in self._known if key in self._labels]

    def add_gradient(self, p: Tensor) -> None:
        """The parameter has a gradient now, which may be the tensor that was counted already."""
        if id(p) not in self._gradients:
            self._gradients[id(p)] = p.grad.nbytes
            self._gradient_bytes += p.grad.nbytes

    def drop_gradients(self) -> None:
        self._gradients.clear()
        self._gradient_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is _DEVICE:  # asked for by every second line of torch
            return _META if self._fake.in_kernel_invocation else _CPU
        self._function = function
        return super().__torch_dispatch__(function, types, args, kwargs)

    def compute(self, function: Any, args: tuple, kwargs: dict) -> Any:
        kind = _KINDS.get(function)
        if kind is None:
            kind = _KINDS[function] = _kind(function)
        if kind == "other":
            return function(*args, **kwargs)
        key = [function]
        try:
            any_fake = _describe(args, key)
            any_fake |= _describe(tuple(kwargs.items()), key)
        except _Unknown:
            any_fake = False
        if not any_fake:  # as it is: real tensors are computed with
            return function(*args, **kwargs)
        if kind == "in_place":
            return args[0]
        if kind == "view":
            with in_kernel_invocation_manager(self._fake):
                made = function(*args, **kwargs)
            return self._wrapped(made)
        key = tuple(key)
        recipe = _SHAPES.get(key)
        if recipe is None:
            made = function(*args, **kwargs)
            _SHAPES[key] = _recipe(made)
            return made
        single, parts = recipe
        with in_kernel_invocation_manager(self._fake):
            made = [
                torch.empty_strided(part[0], part[1], dtype=part[2], device="meta") if type(part) is tuple else part
                for part in parts
            ]
        return self._wrapped(made[0] if single else made)

    def _wrapped(self, made: Any) -> Any:
        if isinstance(made, Tensor):
            return FakeTensor(self._fake, made, _CPU)
        return tuple(FakeTensor(self._fake, each, _CPU) if isinstance(each, Tensor) else each for each in made)


class _Unknown(Exception):
    """Raised for arguments that are no keys; never leaves this file."""


_PLAIN = frozenset(
    (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, complex)
)


def _describe(args: tuple | list, key: list[Any]) -> bool:
    """Adds what the result's shape depends on to `key`; whether a fake tensor was among it."""
    any_fake = False
    for each in args:
        kind = type(each)
        if isinstance(each, Tensor):
            any_fake |= kind is FakeTensor
            key += (each.shape, each.stride(), each.dtype)
        elif kind is tuple or kind is list:
            key.append(len(each))
            any_fake |= _describe(each, key)
        elif kind in _PLAIN:
            key += (kind, each)
        else:
            raise _Unknown
    return any_fake


def _kind(function: Any) -> str:
    """What its schema says: "new" results, a "view", "in_place" of its first argument, or "other"."""
    schema = function._schema
    if torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags:
        return "other"
    if function.namespace == "prim":
        return "other"
    returns_alias = [r.alias_info is not None for r in schema.returns]
    if schema.is_mutable:
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        first = written == [schema.arguments[0].name] and schema.arguments[0].type.kind() == "TensorType"
        ok = first and returns_alias == [True] and torch.Tag.inplace_view not in function.tags
        return "in_place" if ok and schema.name.endswith("_") else "other"
    if any(returns_alias):
        return "view" if function.is_view and len(returns_alias) == 1 else "other"
    kinds = {str(r.type) for r in schema.returns}
    return "new" if kinds and kinds <= {"Tensor", "int", "float", "bool", "SymInt"} else "other"


def _recipe(made: Any) -> tuple[bool, list[Any]]:
    """Whether it is one result, and how each is made again: size, strides and dtype of a tensor."""
    single = isinstance(made, Tensor)
    parts = [made] if single else made
    return single, [(each.shape, each.stride(), each.dtype) if isinstance(each, Tensor) else each for each in parts]
