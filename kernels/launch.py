"""One description of a Triton launch, which can be run on a device or compiled without one.

An op plans its launches from tensors alone. On a device the plan is run; the ahead-of-time gate makes the same plan
from `meta` tensors and compiles it, so that what is checked is what is launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton

Argument = torch.Tensor | int | float | None

_POINTER_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}


@dataclass(frozen=True)
class Specialisation:
    """One compiled version of a kernel: the arguments of `triton.compile(ASTSource(kernel, signature, constexprs,
    attrs), options=options)`."""

    kernel: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    attrs: dict[tuple[int], list[list[object]]]
    options: dict[str, object]

    @property
    def key(self) -> str:
        """Equal for two launches that run the same machine code, and readable enough to name a test."""
        types = ",".join(f"{name}:{kind}" for name, kind in self.signature.items() if kind != "constexpr")
        constants = ",".join(f"{name}={value}" for name, value in self.constexprs.items())
        aligned = ",".join(str(index) for (index,) in self.attrs)
        options = f"warps={self.options['num_warps']},stages={self.options.get('num_stages', 'default')}"
        return f"{self.kernel.__name__}[{types};{constants};aligned={aligned};{options}]"


@dataclass(frozen=True)
class Launch:
    """One kernel, its one-dimensional grid and all that is passed to it; made by `Launch.of`."""

    kernel: triton.JITFunction
    programs: int
    arguments: dict[str, Argument]
    constexprs: dict[str, object]
    options: dict[str, object]

    @classmethod
    def of(
        cls,
        kernel: triton.JITFunction,
        *,
        programs: int,
        arguments: Mapping[str, Argument],
        constexprs: Mapping[str, object],
        num_warps: int,
        num_stages: int | None = None,
        maxnreg: int | None = None,
        fuse: bool = True,
    ) -> Launch:
        """Take from `arguments` and `constexprs` what the kernel names, so that the kernels of one plan can share both.

        num_stages: tiles of a loop's loads in flight; None leaves it to Triton.
        maxnreg: registers per thread at most; None leaves it to the assembler.
        fuse: whether a product and a sum behind it may be one instruction, which rounds once.
        """
        taken = {name: arguments[name] for name in kernel.arg_names if name not in constexprs}
        # Fusion is named although it is the default up to Triton 3.9: 3.10 turns it off unless asked.
        options = {"num_warps": num_warps, "enable_fp_fusion": fuse}
        if num_stages is not None:
            options["num_stages"] = num_stages
        if maxnreg is not None:
            options["maxnreg"] = maxnreg
        compiled_in = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
        return cls(kernel, programs, taken, compiled_in, options)

    def run(self) -> None:
        """Launch on the current stream of the current device; see `run_all`."""
        self.kernel[(self.programs,)](**self.arguments, **self.constexprs, **self.options)

    def specialisation(self) -> Specialisation:
        """The version of the kernel that `run` compiles or finds compiled.

        It follows the rule of Triton's own launcher: None and the integer 1 become constants, and an address or an
        integer that is a multiple of 16 is known to be one.
        """
        signature: dict[str, str] = {}
        constexprs: dict[str, object] = {}
        attrs: dict[tuple[int], list[list[object]]] = {}
        for index, parameter in enumerate(self.kernel.params):
            name = parameter.name
            value = self.constexprs[name] if name in self.constexprs else self.arguments[name]
            is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            if name in self.constexprs or value is None or is_one:
                signature[name], constexprs[name] = "constexpr", value
                continue
            if isinstance(value, float):
                signature[name] = "fp32"
                continue
            if isinstance(value, torch.Tensor):
                signature[name], number = _POINTER_TYPES[value.dtype], value.data_ptr()
            else:
                signature[name], number = "i32" if -(2**31) <= value < 2**31 else "i64", value
            if number % 16 == 0 and not parameter.do_not_specialize:
                attrs[(index,)] = [["tt.divisibility", 16]]
        return Specialisation(self.kernel, signature, constexprs, attrs, self.options)


def run_all(launches: Iterable[Launch], device: torch.device) -> None:
    """Run a plan in order on `device`: Triton launches on the current device, whatever the tensors say."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()


def unique_specialisations(launches: Iterable[Launch]) -> Sequence[Specialisation]:
    """The different specialisations among `launches`, in order of first use."""
    return list({s.key: s for s in (launch.specialisation() for launch in launches)}.values())
