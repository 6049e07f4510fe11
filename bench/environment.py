"""What a figure depends on: versions, processor, threads. Stored with every row."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from fastdistill import _native, info

_ROOT = Path(__file__).resolve().parent.parent


def describe(device: str = "cpu") -> dict[str, object]:
    """JSON-able; None where a thing is not known here. With the GPU, its driver and libraries if that is the device."""
    library = _native.cpu_library()
    return {
        "device": cpu_model() if device == "cpu" else torch.cuda.get_device_name(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fastdistill": _version("fastdistill"),
        "commit": commit(_ROOT),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "capability": library.detail or f"none: {library.problem}",
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        **(_gpu() if device == "cuda" else {}),
    }


def _gpu() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": info.collect_versions()["driver"],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cuda_library": _native.cuda_library().problem or _native.cuda_library().detail,
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def slug(described: Mapping[str, object], device: str) -> str:
    """The name of a device as a folder: "cpu-amd-epyc", "nvidia-h200"."""
    name = re.sub(r"[^a-z0-9]+", "-", str(described["device"]).lower()).strip("-")
    return f"cpu-{name}" if device == "cpu" else name


def commit(root: Path) -> str | None:
    """The commit of the source tree at `root` ("-dirty" with local changes); None if it is not one, or has none."""
    top = _git(root, "rev-parse", "--show-toplevel")
    head = _git(root, "rev-parse", "--verify", "HEAD")
    if not head or not top or Path(top).resolve() != root.resolve():  # an installed package in someone's repository
        return None
    return head + ("-dirty" if _git(root, "status", "--porcelain") else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def last_level_cache_bytes() -> int | None:
    """Of the first core, as Linux reports it."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((_bytes(size) for size in sizes), default=None)


def _bytes(size: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
