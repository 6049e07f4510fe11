"""Compiles a Triton kernel for a GPU that need not be here, and reads what a thread of it costs."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Specialisation


@dataclass(frozen=True)
class Resources:
    """What a kernel uses. registers: per thread; spilled: bytes of local memory per thread; shared: bytes per block."""

    registers: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class Compiled:
    ptx: str
    resources: Resources


def compile_for(capability: int, specialisation: Specialisation, **options: object) -> Compiled:
    """Compile for compute capability `capability` (90 for 9.0), in a process that does not interpret kernels.

    options: in place of the specialisation's own, as `triton.compile` takes them.
    """
    source = ASTSource(specialisation.kernel, specialisation.signature, specialisation.constexprs, specialisation.attrs)
    options = {**specialisation.options, **options}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        (usage,) = resource_usage(Path(cubin.name)).values()
    return Compiled(kernel.asm["ptx"], Resources(usage.registers, usage.spilled, kernel.metadata.shared))


def resource_usage(binary: Path, architecture: str | None = None) -> dict[str, Resources]:
    """Per function (mangled name) of a cubin, or of a library's code for `architecture` ("sm_90a"); its static shared
    memory alone is known here."""
    command = [cuobjdump(), "--dump-resource-usage", *(["--gpu-architecture", architecture] if architecture else [])]
    text = subprocess.run([*command, binary], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {
        name: Resources(int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in found
    }


def cuobjdump() -> str:
    """The tool's path: Triton carries one."""
    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(carried) if carried.exists() else shutil.which("cuobjdump") or "cuobjdump"
