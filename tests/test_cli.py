"""The command line: what it writes, and that whatever is wrong ends in one line, exit code 2 and nothing written."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fastdistill
from fastdistill import _native, _output, _pictures, ops
from fastdistill.cli import app, main
from fastdistill.models import bundled_models
from fastdistill.models.digits.metrics import recognise
from fastdistill.models.digits.text import prompt
from fastdistill.ops import _dispatch


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command in an empty folder; gives typer's result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # else rich breaks lines where the terminal of the test ends
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def pipeline_folder(tmp_path):
    """A copy of a bundled model, to be damaged."""
    return shutil.copytree(bundled_models()["digits-dmd"], tmp_path / "model")


@pytest.fixture
def no_model_may_load(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(fastdistill.OneStepPipeline, "from_pretrained", refuse)


def assert_refused(result, *parts):
    """Exit code 2, one line on stderr with all of `parts`, nothing on stdout."""
    assert result.exit_code == 2, (result.exception, result.stderr)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("fastdistill: ")
    for part in parts:
        assert part in lines[0]
    assert result.stdout == ""


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


# ---- the command itself ---------------------------------------------------------------------------------------------


def test_help_lists_the_commands(run):
    result = run("--help")
    assert result.exit_code == 0
    for command in ("info", "generate", "demo", "bench", "tune", "train", "evaluate"):
        assert command in result.stdout


def test_without_arguments_it_shows_its_help(run):
    result = run()
    assert result.exit_code == 0
    assert "generate" in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["demo", "--help"]])
def test_help_needs_neither_torch_nor_diffusers(arguments):
    code = f"""
import sys
from fastdistill.cli import main
try:
    main({arguments})
except SystemExit as end:
    heavy = sorted({{"torch", "diffusers", "transformers", "numpy", "PIL", "sklearn"}} & set(sys.modules))
    sys.exit(f"exit {{end.code}}, imported {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "exit 0, imported []"


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fastdistill", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fastdistill {fastdistill.__version__}\n", "")


def test_an_error_of_the_real_process_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastdistill", "generate", "seven", "--model", "nowhere"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert files(tmp_path) == []


def test_the_entry_point_is_main():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="fastdistill")
    assert entry.load() is main


def test_an_unknown_command_and_an_unknown_option_are_one_line_that_points_to_the_help(run):
    assert_refused(run("nope"), "nope", "see fastdistill --help")
    assert_refused(run("generate", "seven", "--nope"), "--nope", "see fastdistill generate --help")
    assert_refused(run("generate"), "PROMPT", "see fastdistill generate --help")


def test_a_defect_shows_its_traceback_instead_of_posing_as_bad_input(run, monkeypatch):
    def defect(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr(fastdistill.OneStepPipeline, "from_pretrained", defect)
    result = run("generate", "seven")
    assert isinstance(result.exception, RuntimeError)


def test_the_traceback_of_bad_input_can_be_asked_for(run, monkeypatch):
    monkeypatch.setenv("FASTDISTILL_TRACEBACK", "1")
    assert isinstance(run("generate", "").exception, ValueError)


def test_ctrl_c_is_one_line_exit_code_130_and_nothing_written(run, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fastdistill.OneStepPipeline, "__call__", interrupted)
    result = run("generate", "seven")
    assert (result.exit_code, result.stderr, result.stdout) == (130, "fastdistill: interrupted\n", "")
    assert files(tmp_path) == []


@pytest.mark.parametrize(("command", "module"), [("bench", "fastdistill.bench"), ("train", "fastdistill.training")])
def test_bench_and_train_pass_everything_on(run, monkeypatch, command, module):
    seen = []
    monkeypatch.setattr(sys, "argv", ["fastdistill"])
    monkeypatch.setattr("runpy.run_module", lambda name, **_: seen.append((name, sys.argv[1:])))
    assert run(command, "thing", "--help", "--mode", "forward", "-x").exit_code == 0
    assert seen == [(module, ["thing", "--help", "--mode", "forward", "-x"])]


@pytest.mark.parametrize("command", ["bench", "train"])
def test_bench_and_train_end_as_their_modules_do(run, monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["fastdistill"])
    assert run(command, "--help").exit_code == 0
    assert run(command, "no-such-thing").exit_code == 2


# ---- info -----------------------------------------------------------------------------------------------------------


def test_info_as_json_says_what_the_registry_says(run):
    result = run("info", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["versions"]["torch"] == importlib.metadata.version("torch")
    assert facts["versions"]["fastdistill"] == fastdistill.__version__
    assert facts["versions"]["cuda"] == torch.version.cuda
    assert facts["machine"]["threads"] == torch.get_num_threads()
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["ops"] == {
        name: {backend.name: backend.available() for backend in op.backends} for name, op in _dispatch.ops().items()
    }
    assert facts["models"].keys() == bundled_models().keys()
    assert facts["networks"].keys() == {"digits-vit"}


def test_info_says_where_a_library_is_and_why_one_is_not_there(run, monkeypatch, tmp_path):
    loaded = _native.Library(tmp_path / "_cpu.so", "", "avx2")
    missing = _native.Library(tmp_path / "_cuda.so", "not built: there was no [compiler]")
    monkeypatch.setattr(_native, "cpu_library", lambda: loaded)
    monkeypatch.setattr(_native, "cuda_library", lambda: missing)
    text = run("info").stdout
    assert "avx2" in text
    assert str(tmp_path / "_cpu.so") in text
    assert "not built: there was no [compiler]" in text  # not taken for markup
    libraries = json.loads(run("info", "--json").stdout)["libraries"]
    assert libraries["_cpu"] == {"path": str(loaded.path), "loaded": True, "detail": "avx2", "problem": ""}
    assert libraries["_cuda"]["loaded"] is False
    assert libraries["_cuda"]["problem"] == missing.problem


def test_info_shows_every_backend_with_its_reasons(run):
    text = run("info").stdout
    for name, op in _dispatch.ops().items():
        assert name in text
        for backend in op.backends:
            state = "; ".join(backend.available()) or "available"
            assert re.search(rf"\s{backend.name}\s+{re.escape(state)}", text)
    assert importlib.metadata.version("torch") in text


# ---- generate -------------------------------------------------------------------------------------------------------


def test_generate_writes_one_recognisable_picture_per_prompt(run, tmp_path):
    result = run("generate", *(prompt(digit) for digit in range(10)), "--out", "digit.png")
    assert result.exit_code == 0, result.stderr
    names = [f"digit-{digit}.png" for digit in range(10)]
    assert files(tmp_path) == sorted(names)
    for name in names:
        assert name in result.stdout
    assert "ms per image" in result.stdout
    images = torch.stack([torch.from_numpy(pixels(tmp_path / name)).permute(2, 0, 1) / 127.5 - 1 for name in names])
    assert images.shape == (10, 3, 32, 32)
    assert (recognise(images.float()) == torch.arange(10)).sum() >= 9


def test_one_prompt_makes_the_file_that_was_named(run, tmp_path):
    assert run("generate", "seven", "--out", "seven.png").exit_code == 0
    assert files(tmp_path) == ["seven.png"]
    assert Image.open(tmp_path / "seven.png").size == (32, 32)


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_picture(run, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert run("generate", "seven", "--seed", seed, "--out", f"{name}.png").exit_code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert np.abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "c.png")).max() > 20


def test_image_i_starts_from_seed_plus_i(run, tmp_path):
    assert run("generate", "seven", "eight", "--seed", 3, "--out", "both.png").exit_code == 0
    assert run("generate", "eight", "--seed", 4, "--out", "alone.png").exit_code == 0
    assert np.abs(pixels(tmp_path / "both-1.png") - pixels(tmp_path / "alone.png")).max() <= 1


def test_a_grid_is_one_picture_with_every_image_in_its_cell(run, tmp_path):
    prompts = [prompt(digit) for digit in range(10)]
    assert run("generate", *prompts, "--grid", "--scale", 2, "--out", "grid.png").exit_code == 0
    assert run("generate", *prompts, "--scale", 2, "--out", "cell.png").exit_code == 0
    sheet = pixels(tmp_path / "grid.png")
    assert sheet.shape == (2 * 64, 5 * 64, 3)
    for digit in range(10):
        row, column = divmod(digit, 5)
        cell = sheet[row * 64 : (row + 1) * 64, column * 64 : (column + 1) * 64]
        np.testing.assert_array_equal(cell, pixels(tmp_path / f"cell-{digit}.png"))


def test_more_steps_make_another_picture(run, tmp_path):
    for steps in (1, 2):
        assert (
            run("generate", "seven", "--model", "digits-teacher", "--steps", steps, "--out", f"{steps}.png").exit_code
            == 0
        )
    assert np.abs(pixels(tmp_path / "1.png") - pixels(tmp_path / "2.png")).max() > 20


def test_a_picture_says_how_it_was_made(run, tmp_path):
    assert run("generate", "seven", "--seed", 3, "--out", "seven.png").exit_code == 0
    text = Image.open(tmp_path / "seven.png").text
    assert text == {"prompt": "seven", "parameters": "model=digits-dmd steps=1 seed=3"}


def test_a_folder_serves_as_a_model(run, tmp_path, pipeline_folder):
    assert run("generate", "seven", "--model", pipeline_folder, "--out", "a.png").exit_code == 0
    assert run("generate", "seven", "--out", "b.png").exit_code == 0
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 5), (7, 4), (10, 5), (12, 4), (16, 4)]
)
def test_grids_are_between_square_and_twice_as_wide(count, columns):
    assert _pictures.grid_columns(count) == columns


# ---- generate: what can be wrong ------------------------------------------------------------------------------------


def test_an_unknown_model_lists_the_known_ones(run, tmp_path):
    assert_refused(run("generate", "seven", "--model", "digits-dnd"), "'digits-dnd'", *bundled_models())
    assert files(tmp_path) == []


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1000])


DAMAGES = {
    "an empty folder": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "model_index.json"),
    "a missing component": (lambda folder: shutil.rmtree(folder / "vae"), "'vae'"),
    "a truncated weight file": (
        lambda folder: truncate(folder / "unet" / "diffusion_pytorch_model.safetensors"),
        "diffusion_pytorch_model.safetensors",
    ),
    "no weight file": (lambda folder: (folder / "text_encoder" / "model.safetensors").unlink(), "'text_encoder'"),
    "a broken configuration": (lambda folder: (folder / "unet" / "config.json").write_text("{"), "config.json"),
    "a broken index": (lambda folder: (folder / "model_index.json").write_text("no JSON"), "model_index.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.usefixtures("no_model_may_load")
def test_a_broken_model_folder_is_named(run, tmp_path, pipeline_folder, damage):
    break_it, named = DAMAGES[damage]
    break_it(pipeline_folder)
    assert_refused(run("generate", "seven", "--model", pipeline_folder), str(pipeline_folder), named)
    assert files(tmp_path) == ["model"]


def test_weights_of_the_wrong_shape_are_one_line(run, tmp_path, pipeline_folder):
    """What only loading can find out."""
    config = pipeline_folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": [32, 32]}))
    assert_refused(run("generate", "seven", "--model", pipeline_folder), str(pipeline_folder))
    assert files(tmp_path) == ["model"]


@pytest.mark.usefixtures("no_model_may_load")
def test_outputs_that_cannot_be_written_are_refused_before_anything_is_computed(run, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("a file")
    assert_refused(run("generate", "seven", "--out", "seven.jpg"), "seven.jpg", ".png")
    assert_refused(run("generate", "seven", "--out", "folder.png"), "folder.png", "is a folder")
    assert_refused(run("generate", "seven", "--out", "missing/seven.png"), "missing/seven.png", "no folder missing")
    assert_refused(run("generate", "seven", "--out", "file/seven.png"), "file/seven.png")
    # /proc takes no files from anybody, root included
    assert_refused(run("generate", "seven", "--out", "/proc/seven.png"), "/proc", "no file can be written")
    assert files(tmp_path) == ["file", "folder.png"]


@pytest.mark.usefixtures("no_model_may_load")
@pytest.mark.parametrize("blank", ["", "  \n"])
def test_an_empty_prompt_is_refused_by_its_number(run, tmp_path, blank):
    assert_refused(run("generate", "seven", blank), "prompt 2 of 2", "empty")
    assert files(tmp_path) == []


def test_a_prompt_beyond_the_encoders_limit_is_refused_with_the_limit(run, tmp_path):
    result = run("generate", "seven", "very " * 40 + "nice seven")
    assert_refused(result, "tokens", "24")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("option", "value"), [("--steps", "0"), ("--seed", "-1"), ("--seed", "x"), ("--scale", "0"), ("--device", "gpu")]
)
def test_an_option_out_of_range_is_refused_by_name(run, tmp_path, option, value):
    assert_refused(run("generate", "seven", option, value), option.strip("-"))
    assert files(tmp_path) == []


def test_a_backend_that_does_not_exist_is_refused_with_those_that_do(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDISTILL_BACKEND", "magic")
    assert_refused(run("generate", "seven"), "'magic'", "reference")
    assert files(tmp_path) == []


def test_backend_errors_are_told_apart_from_defects():
    assert not issubclass(ops.BackendError, ValueError)  # so that cli.py has to know it


# ---- files are written whole or not at all --------------------------------------------------------------------------


def test_a_full_disk_leaves_no_file_behind_and_old_ones_as_they_were(run, tmp_path, monkeypatch):
    (tmp_path / "digit-0.png").write_bytes(b"old")
    opened = []
    real = _output.os.fdopen

    def full_disk(descriptor, mode):
        opened.append(descriptor)
        file = real(descriptor, mode)
        if len(opened) == 2:
            file.close()
            raise OSError(28, "No space left on device")
        return file

    monkeypatch.setattr(_output.os, "fdopen", full_disk)
    result = run("generate", "seven", "eight", "--out", "digit.png")
    assert_refused(result, "digit-1.png", "No space left on device")
    assert len(opened) == 2
    assert files(tmp_path) == ["digit-0.png"]
    assert (tmp_path / "digit-0.png").read_bytes() == b"old"


def test_written_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").write_bytes(b"")
    _output.write_files({tmp_path / "new": b"content"})
    assert (tmp_path / "new").read_bytes() == b"content"
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_checking_a_folder_creates_nothing(tmp_path):
    _output.check_folder(tmp_path / "a" / "b")
    assert files(tmp_path) == []


def test_tune_measures_attention_and_names_the_table(run, monkeypatch, tmp_path):
    from fastdistill.bench import attention_tune

    calls = []
    monkeypatch.setattr(attention_tune, "tune", lambda *options: calls.append(options) or (tmp_path / "t.json", []))
    result = run("tune", "attention", "--device", "cpu", "--shapes", "sd15,vit", "--dtype", "float32", "--pairs", "3")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 't.json'}\n")
    assert calls == [(None, "cpu", ["sd15", "vit"], ("float32",), 3)]


def test_tune_refuses_ops_that_no_table_chooses_for(run):
    assert_refused(run("tune", "geglu"), "op 'geglu': no table chooses its backends; known: attention")
