"""What a device can do at most, in figures: named ones, those of a JSON file, or measured (`measure.py`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch


class UnknownDevice(ValueError):
    """No such device, or a file that does not describe one."""


@dataclass(frozen=True)
class DeviceSpec:
    """The figures of one device.

    Attributes:
        name: of the device.
        copy_gb_s: bytes read plus bytes written per second by a copy of something larger than every cache, in 1e9.
        matmul_tflop_s: of large matrix products, by dtype ("bfloat16"), in 1e12.
        launch_us: of an empty kernel inside a CUDA graph; None where nobody measured it.
        l2_bytes, multiprocessors, shared_memory_bytes: of the chip, per multiprocessor the last; None where unknown.
        source: who says so.
    """

    name: str
    copy_gb_s: float
    matmul_tflop_s: Mapping[str, float] = field(default_factory=dict)
    launch_us: float | None = None
    l2_bytes: int | None = None
    multiprocessors: int | None = None
    shared_memory_bytes: int | None = None
    source: str = ""

    def __post_init__(self) -> None:
        rates = self.matmul_tflop_s
        for name, value in {
            "copy_gb_s": self.copy_gb_s,
            **{f"matmul_tflop_s {k}": v for k, v in rates.items()},
        }.items():
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise UnknownDevice(f"{self.name}: {name} must be a number above 0; got {value!r}")
        if not rates:
            raise UnknownDevice(f"{self.name}: matmul_tflop_s needs the rate of at least one dtype")

    def rate(self, dtype: torch.dtype) -> float:
        """In 1e12 per second. A dtype without a figure gets the fastest one: a limit stays a limit."""
        rates = self.matmul_tflop_s
        return rates.get(str(dtype).removeprefix("torch."), max(rates.values()))


KNOWN = {
    "h200": DeviceSpec(
        "NVIDIA H200",
        copy_gb_s=4300,
        matmul_tflop_s={"bfloat16": 790},
        l2_bytes=50 << 20,
        multiprocessors=132,
        shared_memory_bytes=227 << 10,
        source="copy and matmul as measured on such a chip; the rest from its description",
    ),
}


def find(name: str) -> DeviceSpec:
    """A known device by name, or the one that a JSON file describes by the attributes of `DeviceSpec`."""
    if name in KNOWN:
        return KNOWN[name]
    path = Path(name)
    if path.suffix == ".json":
        return _read(path)
    raise UnknownDevice(f"unknown device {name!r}; known: {', '.join(KNOWN)}, or a .json file that describes one")


def _read(path: Path) -> DeviceSpec:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UnknownDevice(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UnknownDevice(f"{path} is not JSON: {error}") from error
    known = [each.name for each in fields(DeviceSpec)]
    if not isinstance(found, dict) or not isinstance(found.get("matmul_tflop_s"), dict) or "copy_gb_s" not in found:
        raise UnknownDevice(
            f"{path} must hold an object with copy_gb_s and matmul_tflop_s, such as "
            '{"copy_gb_s": 1555, "matmul_tflop_s": {"bfloat16": 250}}'
        )
    for name in found:
        if name not in known:
            raise UnknownDevice(f"{path}: unknown {name!r}; known: {', '.join(known)}")
    return DeviceSpec(**{"name": path.stem, "source": str(path), **found})
