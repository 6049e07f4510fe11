"""The logic of GPU timing, on a device whose steps cost what they say."""

import dataclasses
import gc
import weakref

import pytest
import torch
from fastdistill.bench import group_norm_silu, providers
from fastdistill.bench.gpu_timing import MAX_SETS, MEMORY_SHARE, MIN_CALLS, Rotation, rotation, time_calls, time_replays
from fastdistill.bench.runner import Selection, run

from .fake_gpu import FakeGpu

MIB = 1 << 20


@pytest.mark.parametrize("set_bytes", [MIB // 3, MIB, 30 * MIB, 200 * MIB])
def test_a_rotation_exceeds_twice_the_cache_and_has_at_least_two_sets(set_bytes):
    found = rotation(set_bytes, l2_bytes=50 * MIB, free_bytes=100_000 * MIB)
    assert found.cold
    assert found.sets >= 2
    assert found.sets * set_bytes > 100 * MIB
    assert found.sets == 2 or (found.sets - 1) * set_bytes <= 100 * MIB  # and not more than it takes


def test_a_rotation_stays_within_its_share_of_the_memory_and_says_that_it_is_not_cold():
    found = rotation(200 * MIB, l2_bytes=500 * MIB, free_bytes=3000 * MIB)
    assert found.sets * 200 * MIB <= MEMORY_SHARE * 3000 * MIB
    assert not found.cold


def test_tiny_buffers_do_not_make_an_endless_graph():
    found = rotation(100, l2_bytes=50 * MIB, free_bytes=100_000 * MIB)
    assert found.sets == MAX_SETS
    assert not found.cold


def test_even_one_set_that_does_not_fit_is_tried():
    assert rotation(2000 * MIB, 50 * MIB, 3000 * MIB) == Rotation(sets=1, cold=False)


def test_a_replays_time_is_divided_by_its_calls():
    gpu = FakeGpu()
    timed = time_replays(gpu, lambda: [gpu.run("a", 3)], lambda: [gpu.run("b", 7)], replays=5)
    assert timed.how == "graph"
    assert timed.times.ours == (3000.0,) * 5  # nanoseconds
    assert timed.times.baseline == (7000.0,) * 5
    assert [len(graph) for graph in gpu.recorded] == [MIN_CALLS, MIN_CALLS]


def test_the_two_sides_take_turns_in_alternating_order():
    gpu = FakeGpu()
    time_replays(gpu, lambda: [gpu.run("a", 1)], lambda: [gpu.run("b", 1)], replays=4)
    timed = gpu.log[-8 * MIN_CALLS :]
    assert "".join(timed[::MIN_CALLS]) == "abbaabba"


def test_what_is_rotated_through_is_recorded_in_whole_rounds():
    gpu = FakeGpu()
    ours = [f"a{i}" for i in range(3)]
    time_replays(gpu, lambda: [gpu.run(name, 1) for name in ours], lambda: [gpu.run("b", 1)], replays=1)
    assert gpu.recorded[0] == ours * 7  # 21 calls: the least multiple of three that holds MIN_CALLS
    assert gpu.recorded[1] == ["b"] * MIN_CALLS


def test_kernels_are_counted_per_call():
    gpu = FakeGpu()
    timed = time_replays(gpu, lambda: [gpu.run("a", 1)] * 3, lambda: [gpu.run("b", 1)], replays=1)
    assert timed.launches == 2


@pytest.mark.parametrize("sets", [1, 3])
def test_outputs_rotate_through_as_many_buffers_as_inputs(sets):
    class Result:
        pass

    gpu, alive, most = FakeGpu(), weakref.WeakSet(), [0]

    def result():
        fresh = Result()
        alive.add(fresh)
        most[0] = max(most[0], len(alive))
        return fresh

    gc.collect()
    time_replays(gpu, lambda: [gpu.run("a", 1, result) for _ in range(sets)], lambda: [gpu.run("b", 1)], replays=1)
    assert most[0] == sets


def test_a_device_is_warmed_up_before_it_records_and_once_more_before_it_is_timed():
    gpu = FakeGpu()
    costs = iter([1000] * 3 + [5] * 10_000)
    timed = time_replays(gpu, lambda: [gpu.run("a", lambda: next(costs))], lambda: [gpu.run("b", 1)], replays=2)
    assert timed.times.ours == (5000.0, 5000.0)
    assert gpu.log[:3] == ["a", "a", "a"]
    assert len(gpu.log) == 2 * 3 + 2 * MIN_CALLS * (1 + 2)


def test_what_cannot_be_recorded_is_timed_with_events_and_says_why():
    gpu = FakeGpu(recordable=False)
    gpu.synchronize = lambda: None
    timed = time_replays(gpu, lambda: [gpu.run("a", 3)], lambda: [gpu.run("b", 6)], replays=2)
    assert timed.how == "events"
    assert timed.note == "not recorded in a graph: operation not permitted when stream is capturing"
    assert timed.launches is None
    assert (timed.times.ours, timed.times.baseline) == ((3000.0,) * 2, (6000.0,) * 2)


def test_plain_calls_are_timed_between_two_events():
    gpu = FakeGpu()
    timed = time_calls(gpu, lambda: [gpu.run("a", 3)], lambda: [gpu.run("b", 6)], samples=3)
    assert (timed.how, timed.note, gpu.recorded) == ("events", "", [])
    assert (timed.times.ours, timed.times.baseline) == ((3000.0,) * 3, (6000.0,) * 3)


# ---- a whole row ----------------------------------------------------------------------------------------------------


def rows_on(gpu, caches):
    """Rows of a provider that costs 2 us against a baseline of 6 us, and the inputs that each saw while recording."""
    seen = {"ours": [], "torch": []}

    def step(name, cost, function):
        def call(**arguments):
            if gpu._recording is not None:
                seen[name].append(arguments["x"].data_ptr())
            if gpu.inside:
                gpu.run(name, cost)()
            return function(**arguments)

        return providers.eager(name, call)

    benchmark = dataclasses.replace(
        group_norm_silu.BENCHMARK, baseline=step("torch", 6, group_norm_silu.eager), providers=()
    )
    ours = step("ours", 2, group_norm_silu.eager)
    selection = Selection(
        benchmark,
        cases=benchmark.select_cases(["1280x8x8"]),
        providers=(ours,),
        modes=("forward",),
        dtypes=("float32",),
        layouts=("contiguous",),
        caches=caches,
        device="cuda",
        pairs=3,
        gpu=gpu,
    )
    return list(run(selection)), seen


def test_a_row_says_how_fast_how_exact_how_many_launches_and_how_much_memory():
    (row,), _ = rows_on(FakeGpu(), ("hot",))
    assert (row.status, row.key.device, row.speed.how, row.note) == ("ok", "cuda", "graph", "")
    assert (row.speed.ours_us, row.speed.baseline_us, row.speed.ratio) == pytest.approx((2, 6, 3))
    assert (row.speed.ours_low_us, row.speed.ours_high_us) == pytest.approx((2, 2))
    assert (row.usage.launches, row.usage.peak_bytes) == (2, 4096)


def test_cold_rotates_through_inputs_larger_than_the_cache_and_hot_stays_on_one():
    size = 1280 * 8 * 8 * 4
    gpu = FakeGpu(l2_bytes=3 * size - 1, free_bytes=1000 * size)
    (cold, hot), seen = rows_on(gpu, ("cold", "hot"))
    assert (cold.key.cache, hot.key.cache) == ("cold", "hot")
    calls = len(seen["ours"]) - MIN_CALLS
    cold_inputs, hot_inputs = seen["ours"][:calls], seen["ours"][calls:]
    assert len(set(hot_inputs)) == 1
    assert len(set(cold_inputs)) * 2 * size > 2 * gpu.l2_bytes  # a forward pass reads x and writes y
    assert seen["torch"][: len(cold_inputs)] == cold_inputs  # both sides read the same inputs


def test_a_row_that_is_not_cold_says_so():
    gpu = FakeGpu(l2_bytes=1 << 40, free_bytes=1 << 24)
    (row,), _ = rows_on(gpu, ("cold",))
    assert row.note.startswith("not cold: only")


def test_eager_is_timed_with_events():
    (row,), _ = rows_on(FakeGpu(), ("eager",))
    assert (row.speed.how, row.speed.ratio, row.usage.launches) == ("events", 3, None)


def test_plain_calls_launch_what_was_counted_in_the_graph():
    hot, eager = rows_on(FakeGpu(), ("hot", "eager"))[0]
    assert (eager.speed.how, eager.usage) == ("events", hot.usage)


def test_inputs_are_random_and_never_zeros():
    inputs = group_norm_silu.BENCHMARK.setup(
        group_norm_silu.BENCHMARK.cases[0], torch.bfloat16, "channels_last", torch.device("cpu")
    )
    for tensor in (*inputs.tensors.values(), *inputs.grad_outputs.values()):
        assert (tensor == 0).float().mean() < 0.01
