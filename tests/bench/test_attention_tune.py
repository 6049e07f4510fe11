"""`fastdistill tune attention`: rules from measured rows, the file, refusals."""

import itertools
import json

import pytest
import torch
from fastdistill.bench.accuracy import Accuracy
from fastdistill.bench.attention import BENCHMARK
from fastdistill.bench.attention_tune import as_json, measured_rules, tune
from fastdistill.bench.rows import Key, Row
from fastdistill.bench.timing import PairTimes, Speed

from fastdistill.ops import attention_table, explain


def row(case, provider, us, error=0.0, mode="forward", dtype="bfloat16"):
    key = Key("attention", case, mode, dtype, "tokens", "hot", "cuda", provider)
    return Row(key, "torch", Speed.of(PairTimes((us * 1e3,), (us * 1e3,))), Accuracy("o", error, 0.0, 1.0))


def rules(*rows):
    content = {"device": "any", "source": "a test", "rules": measured_rules(rows)}
    return attention_table.parse(content).rules


def test_the_fastest_backend_whose_result_is_right_is_chosen():
    (rule,) = rules(
        row("8x1024x77x80", "sdpa:cudnn", 3.0, error=float("nan")),
        row("8x1024x77x80", "sdpa:flash", 7.0),
        row("8x1024x77x80", "triton", 5.0),
        Row(row("8x1024x77x80", "sdpa:efficient", 1.0).key, "torch", missing="cannot"),
    )
    assert rule.backends == ("triton", "sdpa:flash", "sdpa")
    assert rule.reason == "measured at 8x1024x77x80: triton 5.0 us, sdpa:flash 7.0 us"


def test_every_measured_site_is_decided_by_its_own_rule_alone():
    found = rules(
        *(
            row(case.name, "triton", 1.0, mode=mode, dtype=dtype)
            for case, mode, dtype in itertools.product(BENCHMARK.cases, ("forward", "full"), ("bfloat16", "float16"))
        )
    )
    assert len(found) == 4 * len(BENCHMARK.cases)
    for case, mode, dtype in itertools.product(BENCHMARK.cases, ("forward", "full"), ("bfloat16", "float16")):
        heads, queries, keys, width = case.shape
        site = attention_table.Site(width, queries, keys, heads, dtype, mode)
        assert [rule.reason for rule in found if rule.holds(site)] == [f"measured at {case.name}: triton 1.0 us"]


def test_a_rule_reaches_half_way_to_the_next_site_and_no_further_than_twice_its_own():
    found = {
        r.reason.split()[2].rstrip(":"): r
        for r in rules(*(row(f"8x{n}x{n}x64", "triton", 1.0) for n in (64, 100, 4096)))
    }
    ranges = [found[f"8x{n}x{n}x64"].ranges[1] for n in (64, 100, 4096)]
    assert ranges == [(33, 80), (81, 200), (2049, 8192)]
    assert found["8x64x64x64"].ranges[3] == (5, 16)


def test_what_nothing_served_gets_no_rule():
    assert rules(row("8x64x64x40", "triton", 1.0, error=2.0)) == ()


def test_the_file_ends_with_the_packages_estimates():
    text = as_json("nvidia-x", measured_rules([row("8x64x64x40", "sdpa:flash", 1.0)]))
    table = attention_table.parse(json.loads(text))
    assert table.device == "nvidia-x"
    assert f"measured with torch {torch.__version__}" in table.source
    estimates = attention_table.read(attention_table.packaged_path("default")).rules
    assert [rule.backends for rule in table.rules[1:]] == [rule.backends for rule in estimates]
    assert all(rule.reason.startswith("estimate: ") for rule in table.rules[1:])


def test_a_measured_table_is_written_and_used(tmp_path, monkeypatch):
    path, measured = tune(tmp_path / "mine.json", "cpu", ["8x64x77x160"], ["float32"], pairs=2)
    assert {r.key.mode for r in measured} == {"forward", "full"}
    assert {r.key.provider for r in measured if r.status == "ok"} == {"sdpa:flash", "sdpa:math"}
    monkeypatch.setenv(attention_table.VARIABLE, str(path))
    q, k, v = (torch.randn(1, 8, n, 160) for n in (64, 77, 77))
    explanation = explain("attention", q, k, v)
    fastest = min((r for r in measured if r.status == "ok" and r.key.mode == "forward"), key=lambda r: r.speed.ours_us)
    assert explanation.backend == fastest.key.provider
    assert f"rule 1 of {path}" in explanation.notes["choice"]


def test_without_a_gpu_it_says_how_to_measure_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU here, and a table is measured on one; --device cpu"):
        tune()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "--device tpu: cannot measure there; known: cpu, cuda"),
        ({"device": "cpu", "dtypes": ["int8"]}, "--dtype int8: unknown; known: float32, float16, bfloat16"),
        ({"device": "cpu", "shapes": ["sd9"]}, "unknown shape 'sd9' of attention; known suites: "),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        tune(tmp_path / "mine.json", **arguments)


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises((ValueError, OSError), match="there is no folder"):
        tune(tmp_path / "nowhere" / "mine.json", "cpu")
