"""Which inputs a row is measured on."""

import dataclasses

import pytest
from fastdistill.bench import group_norm_silu, providers
from fastdistill.bench.runner import Selection, run

CACHE_BYTES = 2_000_000


@pytest.mark.parametrize("cache", ["hot", "cold"])
def test_cold_rotates_through_more_inputs_than_the_cache_holds(cache, monkeypatch):
    monkeypatch.setattr("fastdistill.bench.environment.last_level_cache_bytes", lambda: CACHE_BYTES)
    seen = {}

    def spy(**arguments):
        seen[arguments["x"].data_ptr()] = arguments["x"].nbytes
        return group_norm_silu.eager(**arguments)

    benchmark = group_norm_silu.BENCHMARK
    selection = Selection(
        benchmark,
        cases=benchmark.select_cases(["1280x8x8"]),
        providers=(providers.eager("spy", spy),),
        modes=("forward",),
        dtypes=("float32",),
        layouts=("contiguous",),
        caches=(cache,),
        pairs=1,
    )
    (row,) = run(selection)
    assert row.status == "ok"
    assert row.key.cache == cache
    if cache == "hot":
        assert len(seen) == 1
    else:
        assert sum(seen.values()) > CACHE_BYTES


def test_a_selection_counts_its_rows():
    benchmark = group_norm_silu.BENCHMARK
    selection = Selection(benchmark, benchmark.cases, benchmark.providers, ("forward", "full"), ("float32",), ("any",))
    assert len(selection) == 2 * len(benchmark.cases) * len(benchmark.providers)
    assert len(dataclasses.replace(selection, caches=("hot", "cold"))) == 2 * len(selection)
