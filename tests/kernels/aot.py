"""Compile a Triton kernel for a GPU that is not here, and read what it would cost."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that one program may use, in bytes (CUDA C++ Programming Guide, table of technical specifications).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    ptx: str
    registers: int
    stack: int  # bytes of local memory per thread: where spilled registers go
    shared: int  # bytes per program


def compile_for(capability, specialisation, **options):
    """Compile for compute capability `capability` (90 for 9.0). Needs a process that does not interpret kernels."""
    source = ASTSource(specialisation.kernel, specialisation.signature, specialisation.constexprs, specialisation.attrs)
    options = {**specialisation.options, **options}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups())
    return Compiled(kernel.asm["ptx"], registers, stack + local, kernel.metadata.shared)
