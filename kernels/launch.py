"""One description of a Triton launch, which can be run on a device or compiled without one.

An op plans its launches from tensors alone (`list[Launch]`). On a device the plan is run; the ahead-of-time gate makes the
same plan from `meta` tensors and compiles it, so that what is checked is what is launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

# What Triton's just-in-time launcher assumes about an argument, and so what a compiled version is specialised for:
# an integer of 1 becomes a constant, an integer or address that is a multiple of 16 is known to be one.
_ALIGNMENT = 16
_INT32_MAX = 2**31 - 1
_POINTER_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class Specialisation:
    """What `triton.compile(ASTSource(kernel, signature, constexprs, attrs), options=options)` needs; see `Launch`."""

    kernel: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    attrs: dict[tuple[int], list[list[object]]]
    options: dict[str, int | bool]

    @property
    def key(self) -> tuple:
        """Equal for two launches that run the same machine code."""
        return (
            self.kernel.__name__,
            tuple(self.signature.items()),
            tuple(self.constexprs.items()),
            tuple(self.attrs),
            tuple(self.options.items()),
        )

    def __str__(self) -> str:
        types = sorted({t for t in self.signature.values() if t.startswith("*")} - {"*fp32"}) or ["*fp32"]
        blocks = ",".join(f"{name}={value}" for name, value in self.constexprs.items() if name.isupper())
        aligned = sum(self.signature[name] != "constexpr" for name in self.signature)
        return f"{self.kernel.__name__}[{','.join(types)};{blocks};warps={self.options['num_warps']};{len(self.attrs)}/{aligned} aligned]"


@dataclass(frozen=True)
class Launch:
    """One kernel, its one-dimensional grid and everything that is passed to it.

    `arguments` are tensors, integers, floats or None, `constexprs` the compile-time parameters (spelled in capitals in
    the kernel).
    """

    kernel: triton.JITFunction
    programs: int
    arguments: dict[str, torch.Tensor | int | float | None]
    constexprs: dict[str, int | bool]
    num_warps: int

    @property
    def options(self) -> dict[str, int | bool]:
        # Named although it is the default up to Triton 3.9: the next version turns multiply-add fusion off unless asked.
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launch on the current stream of the current device; see `run_all`."""
        self.kernel[(self.programs,)](**self.arguments, **self.constexprs, **self.options)

    def specialisation(self) -> Specialisation:
        """The version of the kernel that `run` would compile or find compiled."""
        signature: dict[str, str] = {}
        constexprs: dict[str, object] = {}
        attrs: dict[tuple[int], list[list[object]]] = {}
        for index, name in enumerate(self.kernel.arg_names):
            if name in self.constexprs:
                signature[name], constexprs[name] = "constexpr", self.constexprs[name]
                continue
            value = self.arguments[name]
            if value is None or (isinstance(value, int) and value == 1):
                signature[name], constexprs[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = _POINTER_TYPES[value.dtype]
            elif isinstance(value, int):
                signature[name] = "i32" if abs(value) <= _INT32_MAX else "i64"
            else:
                signature[name] = "fp32"
            address = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if signature[name] not in ("constexpr", "fp32") and address % _ALIGNMENT == 0:
                attrs[(index,)] = [["tt.divisibility", _ALIGNMENT]]
        return Specialisation(self.kernel, signature, constexprs, attrs, self.options)


def run_all(launches: Sequence[Launch], device: torch.device) -> None:
    """Run a plan in order on `device` (Triton itself launches on the current device, whatever the tensors say)."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()


def unique(launches: Sequence[Launch]) -> list[Specialisation]:
    """The different specialisations among `launches`, in order of first use."""
    return list({s.key: s for s in (launch.specialisation() for launch in launches)}.values())
