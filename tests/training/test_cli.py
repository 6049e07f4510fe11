"""`python -m fastdistill.training`: what it writes and how it refuses."""

import json
import os
import signal
import sys

import pytest
from fastdistill.training import Trainer, distill
from fastdistill.training.__main__ import app
from typer.testing import CliRunner

from fastdistill.models.digits.folder import save_folder

from .toys import tiny_pipeline

distill_module = sys.modules[distill.__module__]
TINY = [f"--set={setting}" for setting in ("batch_size=4", "critic_ratio=2", "pairs=4", "pair_steps=2")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save_folder(tiny_pipeline(), tmp_path_factory.mktemp("models") / "tiny-teacher", "a card"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a handwritten seven\n\ntwo\n")
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, ["dmd", *map(str, arguments)])


def test_it_writes_a_student_with_the_settings_that_were_asked_for(teacher, prompts, tmp_path):
    out = tmp_path / "student"
    result = run("--teacher", teacher, "--out", out, "--prompts", prompts, "--iterations", 3, "--seed", 5, *TINY)
    assert result.exit_code == 0, result.output
    facts = json.loads((out / "fastdistill.json").read_text())
    assert facts["updates"] == {"student": 3, "fake_score": 6}
    assert facts["config"]["seed"] == 5
    assert facts["prompts"] == 2
    assert "3 of student, 6 of fake_score" in result.output


def test_a_run_that_is_terminated_exits_with_0_and_is_continued_to_the_same_student(
    teacher, prompts, tmp_path, monkeypatch
):
    arguments = ["--teacher", teacher, "--prompts", prompts, "--iterations", 3, *TINY]
    assert run("--out", tmp_path / "whole", *arguments).exit_code == 0

    class Terminated(Trainer):
        def iterate(self):
            super().iterate()
            if self.iteration == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(distill_module, "Trainer", Terminated)
        first = run("--out", tmp_path / "student", "--checkpoints", tmp_path / "run", *arguments)
    assert first.exit_code == 0, first.output
    assert "SIGTERM after update 1 of 3; continue with --checkpoints" in first.output
    assert not (tmp_path / "student").exists()
    second = run("--out", tmp_path / "student", "--checkpoints", tmp_path / "run", "--resume", *arguments)
    assert second.exit_code == 0, second.output
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "student" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "critic_rato=3"], "unknown setting 'critic_rato'; did you mean critic_ratio?"),
        (["--set", "critic_ratio=many"], "needed critic_ratio=<int>"),
        (["--set", "critic_ratio"], "needed critic_ratio=<int>"),
        (["--set", "critic_ratio=0"], "critic_ratio must be 1 or more; got 0"),
        (["--iterations", "0"], "iterations must be 1 or more; got 0"),
        (["--teacher", "no-such-model"], "unknown model 'no-such-model'"),
        (["--prompts", "missing.txt"], "missing.txt: no such file"),
        (["--resume"], "resume needs checkpoints, the folder of the run to continue"),
        (["--device", "warp"], "--device warp: needed cpu, cuda or cuda:N"),
    ],
)
def test_bad_input_is_one_clear_line_exit_code_2_and_nothing_written(arguments, message, teacher, prompts, tmp_path):
    out = tmp_path / "student"
    result = run("--out", out, "--teacher", teacher, "--prompts", prompts, *TINY, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("error:") == 1
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_no_pipeline_folder_is_refused_before_the_work(teacher, prompts, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = run("--out", tmp_path, "--teacher", teacher, "--prompts", prompts, *TINY)
    assert result.exit_code == 2
    assert "is not a pipeline folder" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
