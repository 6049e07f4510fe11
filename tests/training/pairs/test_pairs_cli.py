"""`fastdistill pairs`: what it makes, shows and refuses."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from fastdistill.training import load_pairs
from fastdistill.training.pairs import generation
from fastdistill.training.pairs.__main__ import app
from fastdistill.training.pairs.shards import claimed, shard_file
from typer.testing import CliRunner

from fastdistill.models.digits.folder import save_folder

from ..toys import tiny_pipeline
from .test_sharing import assert_same_tensors


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save_folder(tiny_pipeline(), tmp_path_factory.mktemp("models") / "tiny-teacher", "a card"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a handwritten seven\n\n two \n")
    return str(path)


@pytest.fixture
def arguments(teacher, prompts, tmp_path):
    return ["--teacher", teacher, "--prompts", prompts, "--count", 5, "--steps", 1, "--shard-size", 2]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_generate_inspect_and_verify_agree_on_a_set(arguments, teacher, tmp_path):
    out = tmp_path / "set"
    made = run("generate", "--out", out, "--solver", "heun", "--guidance-scale", 1.5, "--seed", 7, *arguments)
    assert made.exit_code == 0, made.output
    assert f"{out}: 5 pairs, 5 of them made here" in made.output
    contents = json.loads(run("inspect", out, "--json").output)
    asked = {"count": 5, "solver": "heun", "guidance_scale": 1.5, "seed": 7, "steps": 1, "prompt_count": 2}
    assert {name: contents["set"][name] for name in asked} == asked
    assert [(shard["pairs"], shard["state"]) for shard in contents["shards"]] == [
        (2, "whole"),
        (2, "whole"),
        (1, "whole"),
    ]
    assert set(contents["prompts"]) <= {"a handwritten seven", "two"}
    assert contents["bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    verified = run("verify", out, "--teacher", teacher)
    assert verified.exit_code == 0, verified.output
    assert "5 pairs in 3 shards, whole and as they were written, 4 of them solved again" in verified.output
    assert len(load_pairs(out).noise) == 5


def test_the_table_says_which_shards_are_missing_being_made_and_cut_off(arguments, tmp_path):
    out = tmp_path / "set"
    run("generate", "--out", out, *arguments)
    shard_file(out, 0).unlink()
    shard_file(out, 2).unlink()
    shard_file(out, 1).write_bytes(b"half")
    with claimed(out, 2):
        shown = run("inspect", out).output
    assert "0 of 5 pairs" in shown
    for state in ("missing", "cut off", "being made"):
        assert state in shown


def test_verify_gives_each_problem_a_line_by_file_name_and_exit_code_1(arguments, tmp_path):
    out = tmp_path / "set"
    run("generate", "--out", out, *arguments)
    shard_file(out, 0).unlink()
    shard_file(out, 1).write_bytes(b"half")
    result = run("verify", out)
    assert result.exit_code == 1
    lines = result.output.strip().splitlines()
    assert lines[0] == "pairs-00000.safetensors: is missing"
    assert lines[1].startswith("pairs-00001.safetensors: is cut off: 4 of ")
    assert len(lines) == 2


def test_sigterm_ends_with_0_and_says_how_to_go_on(arguments, tmp_path, monkeypatch):
    write = generation.write_shard

    def terminated(*shard):
        os.kill(os.getpid(), signal.SIGTERM)
        write(*shard)

    with monkeypatch.context() as patched:
        patched.setattr(generation, "write_shard", terminated)
        first = run("generate", "--out", tmp_path / "set", *arguments)
    assert first.exit_code == 0, first.output
    assert "SIGTERM after 2 of 5 pairs; the same command goes on with them" in first.output
    second = run("generate", "--out", tmp_path / "set", *arguments)
    assert "5 pairs, 3 of them made here" in second.output


def test_parts_by_option_and_by_torchruns_environment_make_one_set(arguments, tmp_path, monkeypatch):
    out = tmp_path / "set"
    assert (
        "2 pairs of part 2/3, 2 of them made here" in run("generate", "--out", out, "--shard", "2/3", *arguments).output
    )
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    by_rank = run("generate", "--out", out, "--shard", "rank", *arguments)
    assert "3 pairs of part 1/2, 3 of them made here" in by_rank.output
    assert run("verify", out).exit_code == 0


def test_the_processes_of_torchrun_share_the_shards_and_one_of_them_reports(arguments, tmp_path):
    asked = [str(argument) for argument in ["generate", "--out", tmp_path / "set", "--batch-size", 2, *arguments]]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "fastdistill.training.pairs", *asked],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{tmp_path / 'set'}: 5 pairs, ")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run("generate", "--out", tmp_path / "alone", "--batch-size", 2, *arguments).exit_code == 0
    torch.set_num_threads(threads)
    assert_same_tensors(tmp_path / "set", tmp_path / "alone")
    assert run("verify", tmp_path / "set").exit_code == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--teacher", "no-such-model"], "unknown model 'no-such-model'"),
        (["--prompts", "missing.txt"], "prompts missing.txt: No such file"),
        (["--solver", "ddim"], "solver must be one of euler, heun, dpmpp; got 'ddim'"),
        (["--steps", "1001"], "steps must be at most the schedule's 1000; got 1001"),
        (["--shard", "0/3"], "--shard 0/3: needed I/N"),
        (["--shard", "3"], "--shard 3: needed I/N"),
        (["--dtype", "int8"], "--dtype int8: needed one of float32, bfloat16, float16"),
        (["--noise", "lost"], "--noise lost: needed one of stored, seed"),
        (["--device", "warp"], "device warp: needed cpu, cuda or cuda:N"),
    ],
)
def test_bad_input_is_one_clear_line_exit_code_2_and_nothing_written(given, message, arguments, tmp_path):
    result = run("generate", "--out", tmp_path / "set", *arguments, *given)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("error:") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_set_or_of_something_else_is_refused_with_the_differences(arguments, tmp_path):
    run("generate", "--out", tmp_path / "set", *arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    result = run("generate", "--out", tmp_path / "set", *arguments, "--steps", 2, "--seed", 1)
    assert result.exit_code == 2
    assert "holds another set than this one (wanted, there): seed: 1, 0; steps: 2, 1" in result.output
    assert {path: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before
    (tmp_path / "notes.txt").write_text("mine")
    result = run("generate", "--out", tmp_path, *arguments)
    assert result.exit_code == 2
    assert "holds no set of pairs; it is left as it is" in result.output
    result = run("generate", "--out", tmp_path / "notes.txt", *arguments)
    assert result.exit_code == 2
    assert "is a file; needed a folder" in result.output


def test_what_is_no_set_is_refused_by_inspect_and_verify(tmp_path):
    for command in ("inspect", "verify"):
        result = run(command, tmp_path)
        assert result.exit_code == 2
        assert "no set of pairs" in result.output
