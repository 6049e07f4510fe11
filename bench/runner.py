"""Runs the cases of one op and yields a row for each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastdistill.ops import BackendError

from . import accuracy, environment, gpu_timing, usage
from .accuracy import Accuracy
from .benchmark import Benchmark, Case, Inputs, Provider
from .devices import DeviceSpec
from .modes import MODES
from .roofline import limit
from .rows import Key, Row
from .timing import Run, Speed, time_pairs
from .usage import Usage

if TYPE_CHECKING:
    from .gpu import Gpu

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEVICES = ("cpu", "cuda")
# "eager": plain calls on a GPU, where "hot" and "cold" are replays of a graph.
CACHES = {"cpu": ("hot", "cold"), "cuda": ("cold", "hot", "eager")}
PAIRS = {"cpu": 30, "cuda": 100}

# Without a known last-level cache, larger than that of any processor one core of which can be had.
_ASSUMED_CACHE_BYTES = 1 << 29
_SEED = 0


@dataclass(frozen=True)
class Job:
    """Rows that share their inputs: `rows()` measures and yields one for each of `keys`, in order, timed against
    `baseline`."""

    keys: tuple[Key, ...]
    baseline: str
    rows: Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class Selection:
    """What of one op is to be measured.

    `pairs`: interleaved samples per row. `caches`: "hot" calls on one set of inputs, "cold" rotates through sets that
    together are twice the last-level cache, "eager" calls without a graph. `gpu`: to measure on, None for the CPU.
    `spec`: what the device can do at most.
    """

    benchmark: Benchmark
    cases: tuple[Case, ...]
    providers: tuple[Provider, ...]
    modes: tuple[str, ...]
    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    caches: tuple[str, ...] = ("hot",)
    device: str = "cpu"
    pairs: int = 30
    gpu: Gpu | None = None
    spec: DeviceSpec | None = None

    def jobs(self) -> list[Job]:
        """One per mode, dtype, layout and case, in this order."""
        return [
            Job(keys, self.benchmark.baseline.name, lambda keys=keys, case=case: _rows(self, case, keys))
            for mode, dtype, layout, case in itertools.product(self.modes, self.dtypes, self.layouts, self.cases)
            for keys in [
                tuple(
                    Key(self.benchmark.op, case.name, mode, dtype, layout, cache, self.device, provider.name)
                    for cache, provider in itertools.product(self.caches, self.providers)
                )
            ]
        ]

    def tiers(self) -> list[Selection]:
        """The op's own kernels, and all others: two selections, of which one can be measured before the other."""
        own = tuple(p for p in self.providers if p.name in self.benchmark.default)
        others = tuple(p for p in self.providers if p not in own)
        return [dataclasses.replace(self, providers=each) for each in (own, others) if each]

    def __len__(self) -> int:
        return sum(len(job.keys) for job in self.jobs())


def run(selection: Selection) -> Iterator[Row]:
    """One row per mode, dtype, layout, case, cache and provider, in this order."""
    for job in selection.jobs():
        yield from job.rows()


def raised(key: Key, baseline: str, error: Exception) -> Row:
    """The row of a provider that raised."""
    reason = f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Row(key, baseline, missing=reason, raised=True)


def _rows(s: Selection, case: Case, keys: tuple[Key, ...]) -> Iterator[Row]:
    torch.manual_seed(_SEED)
    measurement = _Measurement(s, case, keys[0])
    providers = {provider.name: provider for provider in s.providers}
    for key in keys:
        provider = providers[key.provider]
        try:
            row = measurement.row(key, provider)
        except BackendError:
            raise  # asked for by the user's own environment
        except Exception as error:  # a defect of one must not cost the figures of all others
            row = raised(key, s.benchmark.baseline.name, error)
            row = dataclasses.replace(row, raised=not provider.peer, note=provider.note)
        yield row
        if s.gpu is not None:
            s.gpu.release()


class _Measurement:
    """The rows of one job: inputs, exact results and the baseline's are made once."""

    def __init__(self, selection: Selection, case: Case, key: Key) -> None:
        self.selection, self.case = selection, case
        self.dtype, self.layout = DTYPES[key.dtype], key.layout
        self.mode, self.make_step = key.mode, MODES[key.mode]
        self.device = torch.device("cpu") if selection.gpu is None else selection.gpu.device
        self.inputs = self._setup()
        self._truth: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None = None
        self._usage: dict[str, Usage] = {}
        self._prepared: dict[str, Callable[..., object]] = {}  # compiling takes seconds

    def row(self, key: Key, provider: Provider) -> Row:
        s = self.selection
        baseline = s.benchmark.baseline
        reasons = provider.missing(self.inputs)
        if reasons:
            return Row(key, baseline.name, missing="; ".join(reasons), note=provider.note)
        call, baseline_call = self._prepare(provider), self._prepare(baseline)

        def ours(inputs: Inputs) -> Run:
            return self.make_step(call, provider.adapt(inputs)).run

        def theirs(inputs: Inputs) -> Run:
            return self.make_step(baseline_call, inputs).run

        errors, result_bytes = self._errors(call, provider, baseline_call)
        taken = self._time_on_cpu if s.gpu is None else self._time_on_gpu
        speed, note, launches = taken(key, ours, theirs, result_bytes)
        used = self._used(provider, ours)
        if launches is not None:  # what a graph holds, plain calls launch too
            used = self._usage[provider.name] = Usage(used.peak_bytes, launches)
        return Row(
            key,
            baseline.name,
            speed,
            errors,
            limit=s.spec and limit(s.benchmark.cost(self.case, self.dtype, self.mode), self.dtype, s.spec),
            usage=used,
            note="; ".join(filter(None, (provider.note, provider.remark(self.inputs), note))),
        )

    def _prepare(self, provider: Provider) -> Callable[..., object]:
        if provider.name not in self._prepared:
            self._prepared[provider.name] = provider.prepare(self.inputs)
        return self._prepared[provider.name]

    def _setup(self) -> Inputs:
        return self.selection.benchmark.setup(self.case, self.dtype, self.layout, self.device)

    def _errors(self, call: Callable[..., object], provider: Provider, baseline_call) -> tuple[Accuracy, int]:
        """And how many bytes the results have."""
        if self._truth is None:
            wide = self.inputs.to(torch.float64)
            self._truth = (
                self.make_step(baseline_call, self.inputs).tensors(),
                self.make_step(baseline_call, wide).tensors(),
            )
        results = self.make_step(call, provider.adapt(self.inputs)).tensors()
        return accuracy.compare(results, *self._truth, self.dtype), sum(t.nbytes for t in results.values())

    def _time_on_cpu(self, key: Key, ours, theirs, _: int) -> tuple[Speed, str, None]:
        sets = [self.inputs]
        if key.cache == "cold":
            cache = environment.last_level_cache_bytes() or _ASSUMED_CACHE_BYTES
            sets += [self._setup() for _ in range(-(-2 * cache // self.inputs.nbytes(self.mode)))]
        times = time_pairs([ours(each) for each in sets], [theirs(each) for each in sets], self.selection.pairs)
        return Speed.of(times), "", None

    def _time_on_gpu(self, key: Key, ours, theirs, result_bytes: int) -> tuple[Speed, str, float | None]:
        gpu, sets, note = self.selection.gpu, [self.inputs], ""
        if key.cache == "cold":
            each_bytes = self.inputs.nbytes(self.mode) + result_bytes
            rotation = gpu_timing.rotation(each_bytes, gpu.l2_bytes, gpu.free_bytes())
            sets += [self._setup() for _ in range(rotation.sets - 1)]
            if not rotation.cold:
                note = f"not cold: only {rotation.sets} sets of buffers fit"
        timer = gpu_timing.time_calls if key.cache == "eager" else gpu_timing.time_replays
        timed = timer(gpu, lambda: [*map(ours, sets)], lambda: [*map(theirs, sets)], self.selection.pairs)
        return Speed.of(timed.times, timed.how), "; ".join(filter(None, (note, timed.note))), timed.launches

    def _used(self, provider: Provider, ours: Callable[[Inputs], Run]) -> Usage:
        if provider.name not in self._usage:
            run = ours(self.inputs)
            run()
            gpu = self.selection.gpu
            self._usage[provider.name] = (
                usage.on_cpu(run, compiled=provider.compiled) if gpu is None else Usage(gpu.peak_bytes(run))
            )
        return self._usage[provider.name]
