"""What every compiled version of a Triton kernel is held to, on GPUs that are not here."""

from fastdistill.bench.resources import MULTIPROCESSORS
from fastdistill.kernels.compile import compile_for

# Shared memory that one program may use, in bytes.
SHARED_MEMORY = {c: MULTIPROCESSORS[c].shared - MULTIPROCESSORS[c].reserved for c in (80, 90, 100)}


def assert_fits(capability, specialisation):
    """No spilled registers, and no more shared memory than a block may have."""
    used = compile_for(capability, specialisation).resources
    assert used.spilled == 0, f"{specialisation.key}: {used.spilled} bytes of spills per thread"
    assert used.shared <= SHARED_MEMORY[capability], f"{specialisation.key}: {used.shared} bytes shared"
