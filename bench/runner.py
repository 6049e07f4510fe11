"""Runs the cases of one op and yields a row for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import accuracy, environment
from .benchmark import Benchmark, Case, Inputs, Provider
from .modes import MODES
from .rows import Key, Row
from .timing import Speed, time_pairs

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEVICES = ("cpu",)
CACHES = ("hot", "cold")

# Without a known last-level cache, larger than that of any processor one core of which can be had.
_ASSUMED_CACHE_BYTES = 1 << 29
_SEED = 0


@dataclass(frozen=True)
class Selection:
    """What of one op is to be measured.

    `pairs`: interleaved samples per row. `caches`: "hot" calls on one set of inputs, "cold" rotates through sets that
    together are twice the last-level cache.
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

    def __len__(self) -> int:
        groups = (self.cases, self.providers, self.modes, self.dtypes, self.layouts, self.caches)
        count = 1
        for group in groups:
            count *= len(group)
        return count


def run(selection: Selection) -> Iterator[Row]:
    """One row per mode, dtype, layout, case, cache and provider, in this order."""
    s = selection
    for mode, dtype, layout, case in itertools.product(s.modes, s.dtypes, s.layouts, s.cases):
        torch.manual_seed(_SEED)
        inputs = s.benchmark.setup(case, DTYPES[dtype], layout, torch.device(s.device))
        for cache, provider in itertools.product(s.caches, s.providers):
            key = Key(s.benchmark.op, case.name, mode, dtype, layout, cache, s.device, provider.name)
            yield _row(s, key, case, inputs, provider)


def _row(s: Selection, key: Key, case: Case, inputs: Inputs, provider: Provider) -> Row:
    baseline = s.benchmark.baseline
    reasons = provider.missing(inputs)
    if reasons:
        return Row(key, baseline.name, missing="; ".join(reasons))
    call, baseline_call = provider.prepare(inputs), baseline.prepare(inputs)
    make_step = MODES[key.mode]
    errors = accuracy.compare(
        make_step(call, inputs).tensors(),
        make_step(baseline_call, inputs).tensors(),
        make_step(baseline_call, inputs.to(torch.float64)).tensors(),
        DTYPES[key.dtype],
    )
    sets = [inputs] if key.cache == "hot" else _more_than_the_cache(s, key, case, inputs)
    times = time_pairs(
        [make_step(call, each).run for each in sets], [make_step(baseline_call, each).run for each in sets], s.pairs
    )
    return Row(key, baseline.name, Speed.of(times), errors)


def _more_than_the_cache(s: Selection, key: Key, case: Case, inputs: Inputs) -> list[Inputs]:
    cache = environment.last_level_cache_bytes() or _ASSUMED_CACHE_BYTES
    more = -(-2 * cache // inputs.nbytes)
    fresh = (s.benchmark.setup(case, DTYPES[key.dtype], key.layout, torch.device(key.device)) for _ in range(more))
    return [inputs, *fresh]
