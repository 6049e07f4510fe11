"""What every compiled version of a Triton kernel is held to, on GPUs that are not here."""

import triton
from fastdistill.bench.resources import MULTIPROCESSORS
from fastdistill.kernels.compile import compile_for
from packaging.version import Version

# Shared memory that one program may use, in bytes.
SHARED_MEMORY = {c: MULTIPROCESSORS[c].shared - MULTIPROCESSORS[c].reserved for c in (80, 90, 100)}
# Bytes per thread. The assembler that Triton 3.6 brings keeps so many in 7 of 672 versions, once with 40 registers in
# use; a spilled tile takes hundreds.
SPILLED = 0 if Version(triton.__version__) >= Version("3.9") else 24


def assert_fits(capability, specialisation):
    """No spilled registers, and no more shared memory than a block may have."""
    used = compile_for(capability, specialisation).resources
    assert used.spilled <= SPILLED, f"{specialisation.key}: {used.spilled} bytes of spills per thread"
    assert used.shared <= SHARED_MEMORY[capability], f"{specialisation.key}: {used.shared} bytes shared"
