"""`python -m fastdistill.training`: what it writes and how it refuses."""

import json
import os
import shutil
import signal
import sys

import diffusers
import pytest
import torch
from fastdistill.training import Trainer, distill
from fastdistill.training.__main__ import app
from fastdistill.training.documented import described
from fastdistill.training.pairs import pairs_for
from fastdistill.training.registry import METHODS, config_class
from fastdistill.training.run import load_run
from fastdistill.training.watch import watching
from PIL import Image
from safetensors import SafetensorError
from typer.testing import CliRunner

from fastdistill._pictures import png
from fastdistill.models.digits.folder import save_folder

from .toys import tiny_pipeline

distill_module, run_module, supply_module = (sys.modules[each.__module__] for each in (distill, load_run, pairs_for))
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TINY = [f"--set={setting}" for setting in ("trainer.batch_size=4", "critic_ratio=2", "pairs=4", "pair_steps=2")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save_folder(tiny_pipeline(), tmp_path_factory.mktemp("models") / "tiny-teacher", "a card"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a handwritten seven\n\ntwo\n")
    return str(path)


@pytest.fixture
def inputs(teacher, prompts):
    return ["--teacher", teacher, "--prompts", prompts, "--device", "cpu", *TINY]


def run(*arguments):
    return CliRunner().invoke(app, ["dmd", *map(str, arguments)], env={"COLUMNS": "200"})


def test_it_writes_a_student_with_the_settings_that_were_asked_for(inputs, tmp_path):
    out = tmp_path / "student"
    result = run("--out", out, "--updates", 3, "--seed", 5, *inputs)
    assert result.exit_code == 0, result.output
    facts = json.loads((out / "fastdistill.json").read_text())
    assert facts["updates"] == {"student": 3, "fake_score": 6}
    assert facts["config"]["trainer"]["seed"] == 5
    assert facts["prompts"] == 2
    assert "3 of student, 6 of fake_score" in result.output


def test_a_file_that_write_config_wrote_trains_the_same_student(inputs, tmp_path):
    arguments = ["--updates", 2, "--seed", 5, *inputs]
    assert run("--out", tmp_path / "typed", *arguments).exit_code == 0
    file = tmp_path / "run.yaml"
    written = run("--out", tmp_path / "read", *arguments, "--write-config", file)
    assert written.exit_code == 0, written.output
    assert not (tmp_path / "read").exists()
    read = run("--config", file)
    assert read.exit_code == 0, read.output
    assert (tmp_path / "read" / WEIGHTS).read_bytes() == (tmp_path / "typed" / WEIGHTS).read_bytes()


def test_a_run_that_is_terminated_exits_with_0_and_says_how_it_is_continued_to_the_same_student(
    inputs, tmp_path, monkeypatch
):
    arguments = ["--updates", 3, *inputs]
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
    again = f"dmd --config {tmp_path}/run/run.yaml --resume"
    assert f"SIGTERM after 1 of student, 3 of fake_score; go on with: fastdistill train {again}" in first.output
    assert not (tmp_path / "student").exists()
    second = run(*again.split()[1:])
    assert second.exit_code == 0, second.output
    assert (tmp_path / "student" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("module", "name", "number", "begun"),
    [
        (run_module, "Teacher", signal.SIGTERM, False),
        (supply_module, "generate", signal.SIGINT, False),
        (distill_module, "save_pipeline", signal.SIGTERM, True),
    ],
)
def test_a_signal_outside_of_the_loop_ends_with_0_loses_nothing_and_says_how_to_go_on(
    inputs, tmp_path, monkeypatch, module, name, number, begun
):
    arguments = ["--out", tmp_path / "student", "--checkpoints", tmp_path / "run", "--updates", 1, *inputs]
    original = getattr(module, name)

    def interrupted(*given, **options):
        os.kill(os.getpid(), number)
        return original(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, interrupted)
        first = run(*arguments)
    assert first.exit_code == 0, first.output
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    again = f"go on with: fastdistill train dmd --config {tmp_path}/run/run.yaml --resume"
    assert (again if begun else "the same command begins again") in first.output
    second = run(*(again.split()[6:] if begun else arguments))
    assert second.exit_code == 0, second.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "student"]


def test_a_run_that_was_killed_before_its_first_checkpoint_is_begun_again_by_a_resume(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "plot_png", lambda lines, group, colours: png(Image.new("RGB", (1, 1)), {}))
    arguments = ["--out", tmp_path / "student", "--checkpoints", tmp_path / "run", "--watch", tmp_path / "seen"]
    arguments += ["--updates", 2, "--set=trainer.report_every=1", *inputs]
    assert run(*arguments).exit_code == 0
    log = (tmp_path / "seen" / "log.jsonl").read_text().splitlines()
    shutil.rmtree(tmp_path / "run" / "dmd")
    resumed = run("--config", tmp_path / "run" / "run.yaml", "--resume")
    assert resumed.exit_code == 0, resumed.output
    again = (tmp_path / "seen" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["losses"] for line in again] == [json.loads(line)["losses"] for line in log]


def test_a_new_run_in_the_folder_of_another_is_refused_before_anything_is_loaded(inputs, tmp_path):
    arguments = ["--out", tmp_path / "student", "--checkpoints", tmp_path / "run", "--updates", 1, *inputs]
    assert run(*arguments).exit_code == 0
    before = (tmp_path / "run" / "run.yaml").read_text()
    again = run(*arguments, "--seed", 3)
    assert again.exit_code == 2
    assert f"checkpoints {tmp_path}/run: holds a run; needed resume, which continues it" in again.output
    assert (tmp_path / "run" / "run.yaml").read_text() == before


def test_a_resume_with_what_makes_another_run_is_refused_with_the_difference(inputs, tmp_path):
    assert run("--out", tmp_path / "student", "--checkpoints", tmp_path / "run", "--updates", 1, *inputs).exit_code == 0
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_in.bias += 1
    other = save_folder(pipeline, tmp_path / "other", "a card")
    for changed, message in (
        ("--set=regression_weight=0.25", "settings.regression_weight is 0.5 in the checkpoint and 0.25 here"),
        ("--set=prompts=[two]", "settings.prompts is"),
        ("--set=fake_score.beta2=0.9", "settings.fake_score.beta2 is 0.999 in the checkpoint and 0.9 here"),
        (f"--teacher={other}", "settings.weights before is"),
    ):
        refused = run("--config", tmp_path / "run" / "run.yaml", "--resume", "--updates", 2, changed)
        assert refused.exit_code == 2
        assert message in refused.output
    resumed = run("--config", tmp_path / "run" / "run.yaml", "--resume", "--set=student.learning_rate=0.001")
    assert resumed.exit_code == 0, resumed.output


def test_a_disk_that_is_full_when_the_student_is_saved_loses_nothing_and_a_resume_saves_it(
    inputs, tmp_path, monkeypatch
):
    arguments = ["--out", tmp_path / "student", "--checkpoints", tmp_path / "run", "--updates", 2, *inputs]

    def full(*given, **options):
        raise SafetensorError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })')

    with monkeypatch.context() as patched:
        patched.setattr(diffusers.models.modeling_utils.safetensors.torch, "save_file", full)
        first = run(*arguments)
    assert first.exit_code == 2
    assert f"error: {tmp_path}/student: cannot be written" in first.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    second = run("--config", tmp_path / "run" / "run.yaml", "--resume")
    assert second.exit_code == 0, second.output
    facts = json.loads((tmp_path / "student" / "fastdistill.json").read_text())
    assert facts["updates"] == {"student": 2, "fake_score": 4}
    assert facts["training"]["losses"].keys() >= {"dmd", "regression", "fake_score"}


def test_the_configuration_beside_the_checkpoints_is_the_whole_one(inputs, teacher, tmp_path):
    result = run("--out", tmp_path / "student", "--checkpoints", tmp_path / "run", "--updates", 1, "--seed", 7, *inputs)
    assert result.exit_code == 0, result.output
    recorded = load_run(file=tmp_path / "run" / "run.yaml")
    assert recorded.teacher == teacher
    assert recorded.out == tmp_path / "student"
    assert (recorded.method.trainer.seed, recorded.method.trainer.batch_size, recorded.method.pairs) == (7, 4, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_student_is_stored_in_the_dtype_that_was_asked_for(dtype, inputs, tmp_path):
    from safetensors.torch import load_file

    result = run("--out", tmp_path / "student", "--updates", 1, "--export-dtype", dtype, *inputs)
    assert result.exit_code == 0, result.output
    assert {str(t.dtype) for t in load_file(tmp_path / "student" / WEIGHTS).values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "critic_rato=3"], "--set critic_rato: unknown setting; did you mean critic_ratio?"),
        (["--set", "batch_size=3"], "--set batch_size: unknown setting; did you mean trainer.batch_size?"),
        (["--set", "teachr=a"], "--set teachr: unknown setting; did you mean teacher?"),
        (["--set", "critic_ratio=many"], "--set critic_ratio: needed a whole number; got 'many'"),
        (["--set", "critic_ratio"], "needed NAME=VALUE"),
        (["--set", "critic_ratio=0"], "critic_ratio must be 1 or more; got 0"),
        (["--updates", "0"], "--updates 0: method.trainer.updates must be 1 or more; got 0"),
        (["--teacher", "no-such-model"], "unknown model 'no-such-model'"),
        (["--prompts", "missing.txt"], "prompts missing.txt: No such file"),
        (["--pairs", "missing"], "pairs missing: no such folder"),
        (["--resume"], "--resume needs --checkpoints, the folder of the run to continue"),
        (["--resume", "--checkpoints", "missing"], "resume: there is no checkpoint in missing"),
        (["--device", "warp"], "device warp: needed cpu, cuda or cuda:N"),
        (["--device", "meta"], "device meta: needed cpu, cuda or cuda:N"),
        (["--export-dtype", "int8"], "export_dtype must be one of float16, bfloat16, float32; got 'int8'"),
        (["--config", "missing.yaml"], "missing.yaml: cannot be read: No such file"),
        (["--json"], "--json is for --dry-run"),
    ],
)
def test_bad_input_is_one_clear_line_exit_code_2_and_nothing_written(arguments, message, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("--out", tmp_path / "student", *inputs, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("error:") == 1
    assert len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_no_pipeline_folder_is_refused_before_the_work(inputs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = run("--out", tmp_path, *inputs)
    assert result.exit_code == 2
    assert "is not a pipeline folder" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_output_has_to_be_named(inputs):
    result = run("--updates", 1, *inputs)
    assert result.exit_code == 2
    assert "out: is missing; needed --out FOLDER" in result.output


def test_a_configuration_is_not_written_over_a_file(inputs, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("mine")
    result = run(*inputs, "--write-config", file)
    assert result.exit_code == 2
    assert "exists; it is left as it is" in result.output
    assert file.read_text() == "mine"


def test_a_dry_run_says_the_plan_and_writes_nothing(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("--dry-run", "--out", "student", "--checkpoints", "run", "--updates", 30, *inputs)
    assert result.exit_code == 0, result.output
    for text in ("stage dmd, on cpu", "30 updates of the student, 240 samples", "counted from one update", "is kept"):
        assert text in result.output
    assert not list(tmp_path.iterdir())


def test_a_dry_run_as_json_is_json(inputs):
    result = run("--dry-run", "--json", "--updates", 30, *inputs)
    assert result.exit_code == 0, result.output
    (stage,) = json.loads(result.stdout)["stages"]
    assert [(role["role"], role["updates"]) for role in stage["roles"]] == [
        ("student", 30),
        ("teacher", None),
        ("fake_score", 60),
    ]
    assert stage["contract"] == "kept"


@pytest.mark.parametrize("method", METHODS)
def test_the_help_of_a_method_lists_every_setting_with_its_default(method):
    result = CliRunner().invoke(app, [method, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines() if not line.startswith("   ")]  # nor what is wrapped
    listed = {words[0]: words[1] for words in lines if len(words) > 2}
    for name, value, _ in described(config_class(method)()):
        assert listed[name] == value.split()[0]
    for option in ("--config", "--set", "--dry-run", "--write-config", "--resume"):
        assert option in result.output
