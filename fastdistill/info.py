"""What `fastdistill info` says: versions, compiled libraries, backends per op with their reasons, GPUs, the machine.

`collect` asks, `render` prints; the JSON output is what `collect` returns.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

import fastdistill

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

PACKAGES = ("torch", "triton", "diffusers", "transformers")


def collect() -> dict:
    """Everything known about this installation, as plain values that `json.dumps` takes.

    Keys: `versions` (package to version, None where it is not installed; `cuda` is the one that torch was built for,
    `driver` the NVIDIA driver), `machine` (see `machine`), `gpus` (name, compute capability, memory in bytes),
    `libraries` (per compiled library: path, loaded, detail, problem), `ops` (per op, per backend in order of
    preference: the reasons why it cannot serve on this machine; none: it can), `models` and `networks` (bundled name to
    folder; networks are no pipelines).
    """
    from fastdistill import _native, models, ops  # noqa: F401  (ops registers every op)
    from fastdistill.ops import _dispatch

    return {
        "versions": collect_versions(),
        "machine": machine(),
        "gpus": _gpus(),
        "libraries": {"_cpu": _library(_native.cpu_library()), "_cuda": _library(_native.cuda_library())},
        "ops": {
            name: {backend.name: list(backend.available()) for backend in op.backends}
            for name, op in sorted(_dispatch.ops().items())
        },
        "models": {name: str(folder) for name, folder in models.bundled_models().items()},
        "networks": {name: str(folder) for name, folder in models.bundled_networks().items()},
    }


def machine() -> dict:
    """The processor a figure was measured on: its name, the cores this process may use, torch's threads, the system."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def render(info: dict) -> Group:
    """The same for people: tables that rich prints, plain where the output is no terminal."""
    from rich.console import Group

    return Group(
        _two_columns("Versions", {name: version or _absent(name) for name, version in info["versions"].items()}),
        _two_columns("Machine", _machine_lines(info)),
        _two_columns("Compiled libraries", {name: _library_lines(entry) for name, entry in info["libraries"].items()}),
        _backends(info["ops"]),
        _two_columns("Bundled models", info["models"] | info["networks"] or {"none": "this installation carries none"}),
    )


def collect_versions() -> dict[str, str | None]:
    import torch

    versions: dict[str, str | None] = {"fastdistill": fastdistill.__version__, "python": platform.python_version()}
    versions |= {package: _installed(package) for package in PACKAGES}
    return versions | {"cuda": torch.version.cuda, "driver": _driver()}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The NVIDIA driver's version, and the CUDA version it serves. Asked of the driver itself: torch may lack CUDA."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    cuda = ctypes.c_int()
    serves = ""
    if library.cuDriverGetVersion(ctypes.byref(cuda)) == 0:
        serves = f"serves CUDA {cuda.value // 1000}.{cuda.value % 1000 // 10}"
    report = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", report.read_text()) if report.exists() else None
    return ", ".join(part for part in (found[1] if found else "", serves) if part) or None


def _gpus() -> list[dict]:
    import torch

    if not torch.cuda.is_available():
        return []
    every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory} for gpu in every
    ]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return " ".join(found[1].split()) if found else platform.processor() or platform.machine()


def _library(library) -> dict:
    return {
        "path": str(library.path),
        "loaded": not library.problem,
        "detail": library.detail,
        "problem": library.problem,
    }


def _absent(name: str) -> str:
    return {"cuda": "none in this torch", "driver": "no NVIDIA driver found"}.get(name, "not installed")


def _library_lines(entry: dict) -> str:
    return f"loaded, {entry['detail']}\n{entry['path']}" if entry["loaded"] else entry["problem"]


def _machine_lines(info: dict) -> dict[str, str]:
    this = info["machine"]
    lines = {"processor": this["processor"], "cores": f"{this['cores']}, of which torch uses {this['threads']}"}
    lines["system"] = this["system"]
    gpus = [
        f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB"
        for gpu in info["gpus"]
    ]
    return lines | {"GPU": "\n".join(gpus) or "none that torch can use"}


def _two_columns(title: str, rows: dict[str, str]) -> Table:
    from rich.text import Text

    table = _table(title)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _backends(ops: dict) -> Table:
    from rich.text import Text

    table = _table("Backends, in order of preference")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for op, backends in ops.items():
        for backend, reasons in backends.items():
            state = Text("; ".join(reasons)) if reasons else Text("available", "green")
            table.add_row(op if backend == next(iter(backends)) else "", backend, state)
    return table


def _table(title: str) -> Table:
    from rich.table import Table

    return Table(
        title=title, title_justify="left", title_style="bold cyan", show_header=False, box=None, padding=(0, 2)
    )
