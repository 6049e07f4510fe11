"""Two results files, row by row."""

import dataclasses

import pytest
from fastdistill.bench.changes import changes, describe, regressed
from fastdistill.bench.rows import Key

from .test_rows import ABSENT, ENVIRONMENT, measured


def on_gpu(microseconds):
    row = measured(1.5)
    return dataclasses.replace(
        row, key=dataclasses.replace(row.key, device="cuda"), speed=dataclasses.replace(row.speed, ours_us=microseconds)
    )


def test_on_a_cpu_the_ratio_tells_and_on_a_gpu_the_time():
    (change,) = changes([measured(1.0)], ENVIRONMENT, [(measured(1.5), ENVIRONMENT)])
    assert change.factor == pytest.approx(1.5)
    (change,) = changes([on_gpu(30)], ENVIRONMENT, [(on_gpu(20), ENVIRONMENT)])
    assert change.factor == pytest.approx(1.5)


@pytest.mark.parametrize(("ratio", "fails"), [(1.0, True), (1.35, True), (1.37, False), (1.5, False), (3.0, False)])
def test_slower_by_more_than_the_threshold_is_a_failure(ratio, fails):
    found = changes([measured(ratio)], ENVIRONMENT, [(measured(1.5), ENVIRONMENT)])
    assert regressed(found, 0.1) == fails


def test_only_rows_measured_both_times_are_compared():
    now = [measured(1.0), measured(1.0, case="1x8x8"), ABSENT]
    before = [(measured(1.5), ENVIRONMENT), (measured(9.0, case="2x8x8"), ENVIRONMENT), (ABSENT, ENVIRONMENT)]
    assert [change.row.key for change in changes(now, ENVIRONMENT, before)] == [now[0].key]
    assert isinstance(now[0].key, Key)


def test_the_worst_comes_first_and_what_did_not_change_is_not_listed():
    now = [measured(1.5, case="a"), measured(1.0, case="b"), measured(0.5, case="c"), measured(3.0, case="d")]
    before = [(measured(1.5, case=case), ENVIRONMENT) for case in "abcd"]
    lines = describe(changes(now, ENVIRONMENT, before), 0.1, "old.jsonl")
    assert [line.split(": ")[1] for line in lines[:-1]] == [
        "3.00x slower than in old.jsonl",
        "1.50x slower than in old.jsonl",
        "2.00x faster than in old.jsonl",
    ]
    assert lines[-1] == "4 rows compared with old.jsonl: 2 slower by more than 10%"


def test_a_row_from_another_environment_says_what_differs():
    found = changes([measured(1.0)], {**ENVIRONMENT, "torch": "2.14"}, [(measured(1.5), ENVIRONMENT)])
    assert describe(found, 0.1, "old")[0].endswith("(measured elsewhere: torch 2.13 then, 2.14 now)")


def test_nothing_in_common_is_said():
    assert describe(changes([measured(1.0)], ENVIRONMENT, []), 0.1, "old") == ["old: no row in common"]
