"""CUDA kernels on the host: csrc/cuda/<op>*.cu as they are, compiled by g++ with include/ in place of CUDA's headers.

emulator.cpp says what a launch becomes and what it can show. To emulate another op, add its name to OPS.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

OPS = (
    "adamw",
    "adversarial_loss",
    "dmd_gradient",
    "geglu",
    "gradient_norm",
    "group_norm_silu",
    "layer_norm",
    "lpips_distance",
    "squared_norm",
    "weighted_squared_error",
)

HERE = Path(__file__).resolve().parent
CUDA = HERE.parent.parent.parent / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Device:
    """The limits that plans are made for. Small ones take small images through every regime.

    cooperative: 0 no, 1 yes, 2 the device could but has no room for the grid.
    """

    multiprocessors: int = 132
    threads: int = 1024
    shared_bytes: int = 227 * 1024
    clusters: bool = True
    cooperative: int = 1


class Emulator:
    """The library; loading it registers its kernels as the `cuda` overloads of CPU tensors."""

    def __init__(self, library: Path) -> None:
        for op in OPS:
            importlib.import_module(f"fastdistill.ops.{op}")  # which defines the schemas
        torch.ops.load_library(library)
        self._library = ctypes.CDLL(str(library))
        self._library.emulator_trace.restype = ctypes.c_char_p
        self._devices: dict[Device, int] = {}

    @contextlib.contextmanager
    def on(self, device: Device, seed: int = 0) -> Iterator[None]:
        """Launch on `device`, threads and blocks in an order drawn from `seed`; fresh memory is full of NaN."""
        index = self._devices.setdefault(device, len(self._devices))
        limits = (device.multiprocessors, device.threads, device.shared_bytes, int(device.clusters), device.cooperative)
        self._library.emulator_use_device(index, *limits)
        self._library.emulator_seed(seed)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # which fills what is allocated
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)

    def launches(self) -> list[str]:
        """A line for each launch since the last call: "plain", "cluster of 4" or "cooperative", blocks x threads."""
        return self._library.emulator_trace().decode().splitlines()


def build(folder: Path) -> Path:
    """Compile the kernels of OPS; the path of the library."""
    sources = [HERE / "emulator.cpp", *(source for op in OPS for source in sorted(CUDA.glob(f"{op}*.cu")))]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    # Warnings are nvcc's to give. Casts are CUDA's way to move 16 bytes at once.
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
    # A GPU loads 16 bytes only from multiples of 16: the same load elsewhere ends the process.
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    flags += [f"-I{HERE / 'include'}", "-isystem", f"{TORCH / 'include'}"]

    def compile(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        before = [] if source.suffix == ".cpp" else ["-include", HERE / "registration.h"]
        subprocess.run([*compiler, *flags, *before, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sources))
    library = folder / "libemulated.so"
    # -Bsymbolic: the emulator's own functions, not those of a torch without CUDA.
    link = ["-shared", "-Wl,-Bsymbolic", f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    subprocess.run([*compiler, *objects, *link, "-o", library], check=True)
    return library
