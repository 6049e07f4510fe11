"""Which rows are measured in what order, and what a budget leaves out."""

import dataclasses

from fastdistill.bench import group_norm_silu
from fastdistill.bench.execution import by_importance, describe_left_out, run
from fastdistill.bench.runner import Job, Selection

from .test_rows import key, measured


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def job(clock, *cases, seconds=1.0, **settings):
    rows = [measured(1.5, case=case) for case in cases]
    rows = [dataclasses.replace(row, key=dataclasses.replace(row.key, **settings)) for row in rows]

    def measure():
        for row in rows:
            clock.now += seconds
            yield row

    return Job(tuple(row.key for row in rows), "torch", measure)


def cases_of(rows):
    return [row.key.case for row in rows]


def test_without_a_budget_everything_is_measured_in_its_order():
    clock = Clock()
    rows, left_out = run([job(clock, "a", mode="full"), job(clock, "b", "c")], clock=clock)
    assert (cases_of(rows), left_out) == (["a", "b", "c"], [])


def test_with_a_budget_the_most_important_rows_come_first_and_the_rest_is_named():
    clock = Clock()
    work = [
        job(clock, "slow", dtype="float32", layout="contiguous", mode="backward"),
        job(clock, "a", "b", "c", dtype="bfloat16"),
        job(clock, "d", dtype="float32"),
    ]
    rows, left_out = run(work, 2.5, clock=clock)
    assert cases_of(rows) == ["a", "b", "c"]  # what was begun is finished: it is the first row that goes over
    assert [each.case for each in left_out] == ["d", "slow"]


def test_a_job_is_left_between_two_of_its_rows():
    clock = Clock()
    rows, left_out = run([job(clock, "a", "b", "c")], 1.5, clock=clock)
    assert cases_of(rows) == ["a", "b"]
    assert [each.case for each in left_out] == ["c"]


def test_a_job_that_breaks_costs_its_own_rows_only():
    clock = Clock()

    def broken():
        yield measured(1.5, case="a")
        raise RuntimeError("out of\nmemory")

    rows, left_out = run([Job((key(case="a"), key(case="b")), "torch", broken), job(clock, "c")], clock=clock)
    assert cases_of(rows) == ["a", "b", "c"]
    assert [row.status for row in rows] == ["ok", "raised", "ok"]
    assert rows[1].missing == "raised RuntimeError: out of memory"
    assert left_out == []


def test_what_was_measured_is_saved_on_the_way():
    clock, saved = Clock(), []
    work = [job(clock, "a", seconds=10), job(clock, "b", seconds=10), job(clock, "c", seconds=10)]
    run(work, save=lambda rows: saved.append(cases_of(rows)), clock=clock)
    assert saved == [["a", "b"]]  # after 20 of 15 seconds, and not again within the next 15


def test_no_time_at_all_leaves_everything_out():
    clock = Clock()
    rows, left_out = run([job(clock, "a", "b")], 0, clock=clock)
    assert (rows, len(left_out)) == ([], 2)


def test_what_was_left_out_is_counted_by_kind():
    left_out = [key(case="a"), key(case="b"), key(case="a", dtype="bfloat16")]
    assert describe_left_out(left_out) == [
        "the budget is over, 3 rows were left out:",
        "  group_norm_silu forward float32 channels_last: 2",
        "  group_norm_silu forward bfloat16 channels_last: 1",
    ]
    assert describe_left_out([]) == []


def test_inference_in_16_bit_and_channels_last_is_most_important():
    benchmark = group_norm_silu.BENCHMARK
    selection = Selection(
        benchmark,
        benchmark.select_cases(["1280x8x8"]),
        benchmark.providers,
        modes=("backward", "full", "forward"),
        dtypes=("float32", "bfloat16"),
        layouts=("contiguous", "channels_last"),
    )
    first, *_, last = [each.keys[0] for each in by_importance(selection.jobs())]
    assert (first.mode, first.dtype, first.layout) == ("forward", "bfloat16", "channels_last")
    assert (last.mode, last.dtype, last.layout) == ("backward", "float32", "contiguous")
