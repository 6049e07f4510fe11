"""What this machine can do at most: copy bandwidth, matmul rate, and on a GPU the cost of an empty launch."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable

import torch

from . import environment
from .devices import DeviceSpec
from .gpu import Gpu

_REPEATS = 7
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
_COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}  # and at least four times the last cache
_LAUNCHES = 200


@functools.cache
def measured(device: str, threads: int) -> DeviceSpec:
    """Measure a device ("cpu" with so many threads, "cuda") once per process."""
    return _cuda() if device == "cuda" else _cpu(threads)


def _cpu(threads: int) -> DeviceSpec:
    cache = environment.last_level_cache_bytes() or 0

    def seconds(work: Callable[[], object]) -> float:
        work()
        samples = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            work()
            samples.append(time.perf_counter() - start)
        return statistics.median(samples)

    size = min(max(_COPY_BYTES["cpu"], 4 * cache), 1 << 30)
    return DeviceSpec(
        f"{environment.cpu_model()}, {threads} thread{'s' if threads != 1 else ''}",
        copy_gb_s=_copy_rate(torch.device("cpu"), size, seconds),
        matmul_tflop_s=_matmul_rates(torch.device("cpu"), ("float32", "bfloat16"), seconds),
        source="measured",
    )


def _cuda() -> DeviceSpec:
    gpu = Gpu()
    properties = torch.cuda.get_device_properties(gpu.device)

    def seconds(work: Callable[[], object]) -> float:
        with gpu.stream():
            work()
            marks = [gpu.mark()]
            for _ in range(_REPEATS):
                work()
                marks.append(gpu.mark())
            return statistics.median(gpu.elapsed_us(a, b) for a, b in itertools.pairwise(marks)) / 1e6

    size = min(max(_COPY_BYTES["cuda"], 4 * gpu.l2_bytes), gpu.free_bytes() // 8)
    return DeviceSpec(
        properties.name,
        copy_gb_s=_copy_rate(gpu.device, size, seconds),
        matmul_tflop_s=_matmul_rates(gpu.device, ("bfloat16", "float16", "float32"), seconds),
        launch_us=_launch_us(gpu),
        l2_bytes=gpu.l2_bytes,
        multiprocessors=properties.multi_processor_count,
        # Of one block at most; an attribute that not every torch has.
        shared_memory_bytes=getattr(properties, "shared_memory_per_block_optin", None),
        source="measured",
    )


def _copy_rate(device: torch.device, size: int, seconds: Callable[[Callable[[], object]], float]) -> float:
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return _round(2 * source.nbytes / seconds(lambda: target.copy_(source)) / 1e9)


def _matmul_rates(
    device: torch.device, dtypes: tuple[str, ...], seconds: Callable[[Callable[[], object]], float]
) -> dict[str, float]:
    size = _MATMUL_SIZE[device.type]
    rates = {}
    for name in dtypes:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        out = torch.empty_like(a)
        rates[name] = _round(2 * size**3 / seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) / 1e12)
    return rates


def _launch_us(gpu: Gpu) -> float:
    """Of the smallest kernel there is, a fill of one value, inside a graph."""
    value = torch.zeros(1, device=gpu.device)
    with gpu.stream():
        value.add_(1)
        recording = gpu.record(lambda: [value.add_(1) for _ in range(_LAUNCHES)])
        recording.replay()
        samples = []
        for _ in range(_REPEATS):
            start = gpu.mark()
            recording.replay()
            samples.append(gpu.elapsed_us(start, gpu.mark()) / _LAUNCHES)
    return _round(statistics.median(samples))


def _round(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.4g}")
