"""Loads the two compiled libraries and says, for each, what it is or why it is not there."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

CPU_CAPABILITIES = ("baseline", "avx2", "avx512")


@dataclass(frozen=True)
class Library:
    """One compiled library. `problem` is empty when it is loaded; otherwise it says why it is not."""

    path: Path
    problem: str
    detail: str = ""
    handle: ctypes.CDLL | None = None


def _path(name: str) -> Path:
    return Path(__file__).parent / f"{name}.so"


def _not_built(name: str) -> Library:
    """Setup.py writes down why it left a library out."""
    record = _path(name).with_name("_build.json")
    reason = json.loads(record.read_text()).get(name[1:]) if record.exists() else ""
    return Library(_path(name), f"not built: {reason}" if reason else "not built: fastdistill was not installed")


def _load(name: str) -> Library:
    path = _path(name)
    if not path.exists():
        return _not_built(name)
    try:
        torch.ops.load_library(str(path))
        return Library(path, "", handle=ctypes.CDLL(str(path)))
    except OSError as error:
        return Library(path, f"{path.name} does not load: {error}")


@functools.cache
def cpu_library() -> Library:
    """The C++ kernels. `detail` is the instruction set in use (FASTDISTILL_CPU_CAPABILITY may ask for a lower one)."""
    wanted = os.environ.get("FASTDISTILL_CPU_CAPABILITY")
    if wanted is not None and wanted not in CPU_CAPABILITIES:
        raise ValueError(f"FASTDISTILL_CPU_CAPABILITY={wanted!r}: expected one of {', '.join(CPU_CAPABILITIES)}")
    library = _load("_cpu")
    if library.handle is None:
        return library
    capability = library.handle.fastdistill_cpu_capability
    capability.restype = ctypes.c_char_p
    return Library(library.path, "", capability().decode(), library.handle)


@functools.cache
def cuda_library() -> Library:
    """The CUDA kernels. `detail` lists the architectures they were built for. Loaded only where torch has CUDA."""
    if not _path("_cuda").exists():
        return _not_built("_cuda")
    if torch.version.cuda is None:
        return Library(_path("_cuda"), f"built, not loaded: torch {torch.__version__} has no CUDA")
    library = _load("_cuda")
    if library.handle is None:
        return library
    architectures = library.handle.fastdistill_cuda_architectures
    architectures.restype = ctypes.c_char_p
    return Library(library.path, "", architectures().decode(), library.handle)


@functools.cache
def cuda_problem(device_index: int) -> str:
    """Why the CUDA library cannot serve this GPU; empty when it can. Asked once per device."""
    library = cuda_library()
    if library.problem:
        return library.problem
    runtime, driver = (
        library.handle.fastdistill_cuda_runtime_version(),
        library.handle.fastdistill_cuda_driver_version(),
    )
    if driver // 1000 < runtime // 1000:
        return (
            f"needs a driver for CUDA {runtime // 1000}.x, the one here is for {driver // 1000}.{driver % 1000 // 10}"
        )
    capability = torch.cuda.get_device_capability(device_index)
    if not any(_runs_on(architecture, capability) for architecture in library.detail.split(";")):
        return f"built for {library.detail}, not for this GPU ({capability[0]}.{capability[1]})"
    return ""


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    # Machine code runs on its own major version from its minor version up; "a" code on that version alone.
    major, minor = (int(part) for part in architecture.rstrip("a").split("."))
    if architecture.endswith("a"):
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]
