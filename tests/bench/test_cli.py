"""`python -m fastdistill.bench`: bad options, a tiny real run, and its exit codes."""

import dataclasses

import pytest
import torch
from fastdistill.bench import group_norm_silu, providers, rows
from fastdistill.bench.cli import app
from fastdistill.bench.environment import commit
from typer.testing import CliRunner

TINY = ["--shapes", "1280x8x8", "--dtype", "float32", "--layout", "contiguous", "--pairs", "2"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["group_norm"], "unknown op 'group_norm'; known: group_norm_silu, layer_norm, geglu, engine, training"),
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
