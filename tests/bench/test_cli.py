"""`python -m fastdistill.bench`: bad options, a tiny real run, and its exit codes."""

import dataclasses
import json
import sys

import pytest
import torch
from fastdistill.bench import group_norm_silu, profiling, providers, rows, training, training_memory
from fastdistill.bench.cli import app
from fastdistill.bench.environment import commit
from PIL import Image
from typer.testing import CliRunner

TINY = ["--shapes", "1280x8x8", "--dtype", "float32", "--layout", "contiguous", "--pairs", "2"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["group_norm"],
            "unknown op 'group_norm'; known: group_norm_silu, layer_norm, geglu, attention,",
        ),
        (["--shapes", "sd3"], "unknown shape 'sd3' of group_norm_silu; known suites: unet, sd15"),
        (["--dtype", "float32,float8"], "--dtype: unknown 'float8'; known: float32, float16, bfloat16, all"),
        (["--layout", "nhwc"], "--layout: unknown 'nhwc'; known: contiguous, channels_last, all"),
        (["--mode", "inference"], "--mode: unknown 'inference'; known: forward, backward, full, all"),
        (["--cache", "warm"], "--cache: unknown 'warm'; known: hot, cold, all"),
        (["--providers", "xformers"], "unknown provider 'xformers' of group_norm_silu; known: cuda, triton, cpu,"),
        (["--device", "tpu"], "--device: cannot time on 'tpu'; known: cpu, cuda"),
        (["--cache", "eager"], "--cache: unknown 'eager'; known: hot, cold, all"),
        (["--device-spec", "h900"], "unknown device 'h900'; known: h200, or a .json file"),
        (["--baseline", "nowhere.jsonl"], "--baseline: cannot read nowhere.jsonl: No such file"),
        (["--dtype", ","], "--dtype: got an empty list"),
    ],
)
def test_an_unknown_name_is_one_line_with_the_known_ones(arguments, message):
    operation = [] if arguments == ["group_norm"] else ["group_norm_silu"]
    result = run(*operation, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [[], ["group_norm_silu", "--pairs", "0"], ["group_norm_silu", "--threads", "x"]])
def test_a_malformed_command_line_is_exit_code_2(arguments):
    assert run(*arguments).exit_code == 2


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").touch()
    result = run("group_norm_silu", *TINY, "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --out: cannot write to")


def test_a_backend_forced_by_the_environment_that_cannot_serve_is_one_line(monkeypatch):
    monkeypatch.setenv("FASTDISTILL_BACKEND", "triton")
    result = run("group_norm_silu", *TINY, "--providers", "reference")
    assert result.exit_code == 2
    assert "backend 'triton' cannot serve this call" in result.stderr


@pytest.mark.parametrize("cache", ["hot", "cold"])
def test_a_tiny_run_is_printed_and_read_back(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("fastdistill.bench.environment.last_level_cache_bytes", lambda: 1 << 20)
    result = run("group_norm_silu", *TINY, "--providers", "cuda,reference", "--cache", cache, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (absent, environment), (measured, _) = rows.read_jsonl(tmp_path / rows.RESULTS)
    assert (absent.key.provider, measured.key.provider) == ("cuda", "reference")
    assert "needs a CUDA tensor" in absent.missing
    assert measured.key == dataclasses.replace(absent.key, provider="reference")
    assert (measured.key.case, measured.key.cache, measured.status) == ("1280x8x8", cache, "ok")
    assert measured.speed.pairs == 2
    assert measured.speed.ours_us > 0
    assert measured.speed.ratio_low <= measured.speed.ratio <= measured.speed.ratio_high
    assert 0 < measured.accuracy.error <= measured.accuracy.allowed < 1e-4
    assert {"torch", "triton", "commit", "cpu", "threads", "capability"} <= set(environment)
    assert f"{measured.speed.ratio:.2f}x" in result.stdout
    assert "1280x8x8" in result.stdout


def test_every_mode_runs():
    result = run("group_norm_silu", *TINY, "--mode", "all", "--providers", "reference")
    assert result.exit_code == 0, result.output
    assert [line.split()[1] for line in result.stdout.splitlines() if "median" in line][-3:] == [
        "forward",
        "backward",
        "full",
    ]


def test_a_result_beyond_its_limit_is_printed_as_failed_and_is_exit_code_1(monkeypatch):
    def wrong(**arguments):
        return group_norm_silu.eager(**arguments) * 1.01

    wrong_provider = providers.eager("wrong", wrong)
    benchmark = dataclasses.replace(group_norm_silu.BENCHMARK, providers=(wrong_provider,))
    monkeypatch.setattr(group_norm_silu, "BENCHMARK", benchmark)
    result = run("group_norm_silu", *TINY, "--providers", "wrong")
    assert result.exit_code == 1
    assert "1 FAILED: 1280x8x8" in result.stdout


def test_a_run_that_measured_nothing_is_exit_code_1():
    result = run("group_norm_silu", *TINY, "--providers", "triton,cuda")
    assert result.exit_code == 1
    assert "nothing was measured" in result.stderr


def test_a_folder_without_history_has_no_commit(tmp_path):
    assert commit(tmp_path) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_what_works_instead():
    result = run("group_norm_silu", "--device", "cuda")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: --device cuda: torch sees no GPU here; --device-spec h200 predicts without one, "
        "--dry-run lists the rows\n"
    )


def test_a_second_run_into_the_same_folder_adds_its_rows(tmp_path):
    for mode in ("forward", "full", "forward"):
        run("group_norm_silu", *TINY, "--providers", "reference", "--mode", mode, "--out", tmp_path)
    assert [row.key.mode for row, _ in rows.read_jsonl(tmp_path / rows.RESULTS)] == ["forward", "full"]


def test_pictures_are_drawn_beside_the_results(tmp_path):
    result = run("group_norm_silu", *TINY, "--providers", "reference,torch", "--out", tmp_path)
    assert "2 plots written to" in result.stdout
    for name in ("group_norm_silu-forward.png", "roofline.png"):
        with Image.open(tmp_path / name) as picture:
            width, height = picture.size
            assert min(width, height) > 300
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_without_matplotlib_the_results_are_written_and_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("group_norm_silu", *TINY, "--providers", "reference", "--out", tmp_path)
    assert result.exit_code == 0
    assert 'pip install "fastdistill[bench]"' in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == [rows.RESULTS]


@pytest.mark.parametrize(("factor", "exit_code"), [(1000.0, 1), (1e-6, 0)])
def test_a_baseline_that_was_faster_is_exit_code_1(tmp_path, factor, exit_code):
    arguments = ["group_norm_silu", *TINY, "--providers", "reference"]
    run(*arguments, "--out", tmp_path)
    ((row, environment),) = rows.read_jsonl(tmp_path / rows.RESULTS)
    then = dataclasses.replace(row, speed=dataclasses.replace(row.speed, ratio=row.speed.ratio * factor))
    rows.write_jsonl([then], environment, tmp_path)
    result = run(*arguments, "--baseline", tmp_path / rows.RESULTS)
    assert result.exit_code == exit_code
    assert "1 rows compared with" in result.stdout


def test_a_baseline_that_is_no_results_file_is_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("hello\n")
    result = run("group_norm_silu", *TINY, "--baseline", tmp_path / "notes.txt")
    assert result.exit_code == 2
    assert "line 1 is no row of a benchmark" in result.stderr


def test_a_budget_that_is_over_leaves_rows_out_and_says_which():
    result = run("group_norm_silu", *TINY, "--budget", "0")
    assert "the budget is over, 3 rows were left out:" in result.stdout
    assert "group_norm_silu forward float32 contiguous: 3" in result.stdout


def test_a_dry_run_lists_the_rows_of_a_gpu_without_one():
    result = run("all", "--device", "cuda", "--providers", "cuda,torch", "--shapes", "1280x8x8,64x1280", "--dry-run")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "group_norm_silu forward bfloat16 channels_last cold cuda 1280x8x8"
    assert "engine cached prompt float32 - - fastdistill digits-dmd" in lines
    # Two providers, three caches, two dtypes; group_norm_silu in two layouts; two rows of the engine, 17 of training.
    assert lines[-1] == f"{2 * 3 * 2 * (2 + 1) + 2 + 17} rows"


def test_an_op_without_the_shape_is_left_out_where_another_has_it():
    result = run("group_norm_silu", "layer_norm", "--shapes", "1280x8x8", "--providers", "reference", "--dry-run")
    assert {line.split()[0] for line in result.stdout.splitlines()[:-1]} == {"group_norm_silu"}


def test_a_profile_is_a_trace_with_the_names_of_the_calls(tmp_path):
    result = run("group_norm_silu", *TINY, "--providers", "reference,cuda", "--mode", "full", "--profile", tmp_path)
    assert result.exit_code == 0
    name = "group_norm_silu:reference:full:float32:contiguous:1280x8x8"
    assert result.stdout.splitlines()[0] == name
    assert "cuda:full" not in result.stdout
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ranges = [event for event in events if event["name"] == name and event["ph"] == "X"]
    assert len(ranges) == profiling.CALLS
    start, end = ranges[0]["ts"], ranges[0]["ts"] + ranges[0]["dur"]
    inside = {event["name"] for event in events if event["ph"] == "X" and start <= event["ts"] < end}
    assert "aten::native_group_norm" in inside


def test_the_engine_and_an_update_are_measured_with_their_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CASES", {"reflow": training.CASES["reflow"]})
    monkeypatch.setattr(training_memory, "OPTIONS", {})
    result = run("engine", "training", "--pairs", "3", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    measured = {row.key.mode: row for row, _ in rows.read_jsonl(tmp_path / rows.RESULTS)}
    assert set(measured) == {"cached prompt", "new prompt", "reflow update"}
    for row in measured.values():
        assert row.status == "ok"
        assert row.speed.pairs == 3
        assert row.usage.peak_bytes > 100_000
    assert 0 < measured["new prompt"].accuracy.error < 1e-4


def test_a_results_file_that_cannot_be_merged_into_is_refused_before_anything_runs(tmp_path):
    (tmp_path / rows.RESULTS).write_text("hello\n")
    result = run("group_norm_silu", *TINY, "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --out: ")
    assert (tmp_path / rows.RESULTS).read_text() == "hello\n"


@pytest.mark.parametrize("option", ["--device-spec=h200", "--profile={}"])
def test_a_whole_program_has_neither_a_roofline_nor_a_profile_here(tmp_path, option):
    result = run("engine", option.format(tmp_path))
    assert result.exit_code == 2
    assert "engine, training" in result.stderr
