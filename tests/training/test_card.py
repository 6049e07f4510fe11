"""The model card of a student, and its folder in the hands of others."""

import dataclasses
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from fastdistill.training import DMDConfig, distill
from fastdistill.training import card as card_module
from fastdistill.training.card import licence_of, package_commit, student_card
from fastdistill.training.pipelines import save_pipeline
from fastdistill.training.run import command, load_run, save_student, train
from fastdistill.training.settings import from_dict

import fastdistill
from fastdistill import OneStepPipeline
from fastdistill.engine.sampling import _FAMILIES
from fastdistill.models.digits.folder import save_folder

from .toys import tiny_pipeline

TEACHER_CARD = "---\nlicense: cc-by-4.0\ntags: [tiny]\n---\n\n# tiny-teacher\n"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_folder(tiny_pipeline(), tmp_path_factory.mktemp("models") / "tiny-teacher", TEACHER_CARD)


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    settings = ["trainer.batch_size=4", "critic_ratio=2", "pairs=4", "pair_steps=2"]
    out = tmp_path_factory.mktemp("out") / "student"
    prompts = ["a handwritten seven", "two"]
    return load_run(
        "dmd", settings=settings, teacher=str(teacher), prompts=prompts, out=out, updates=1, seed=4, device="cpu"
    )


@pytest.fixture(scope="module")
def result(run):
    return train(run)


@pytest.fixture(scope="module")
def folder(run, result):
    return save_student(run, result)


def test_the_card_says_what_made_the_student(folder, run, result):
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "cc-by-4.0"
    assert (front["library_name"], front["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert "dmd" in front["tags"]
    for text in (
        "needs one step, distilled from `tiny-teacher`",
        "arXiv 2311.18828",
        result.facts["teacher"]["unet_sha256"],
        "Licence: cc-by-4.0, as the teacher's card says",
        "Prompts: 2.",
        "Real images: none.",
        "| student | 1 |",
        "| fake_score | 2 |",
        f"fastdistill {fastdistill.__version__}",
        command(run, out="student"),
        "one step from unit noise at t = 999, without guidance".capitalize(),
    ):
        assert text in card, text


def test_the_cards_settings_are_the_runs(folder, run):
    card = (folder / "README.md").read_text()
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert settings.pop("name") == "dmd"
    assert from_dict(DMDConfig, settings) == run.method


def test_the_cards_code_runs_beside_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    pieces = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert ["OneStepPipeline" in piece for piece in pieces] == [False, True]
    for piece in pieces:
        Path("image.png").unlink(missing_ok=True)
        exec(piece, {})
        assert Path("image.png").stat().st_size > 100


def test_diffusers_and_the_engine_draw_the_same_picture(folder):
    engine = OneStepPipeline.from_pretrained(folder, device="cpu")
    ours = engine(["a handwritten seven"], seed=3, steps=1, output="np")
    plain = DiffusionPipeline.from_pretrained(folder)
    theirs = plain(
        "a handwritten seven",
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_a_student_made_from_python_has_a_card_too(teacher, tmp_path):
    config = dataclasses.replace(DMDConfig(regression_weight=0.0, critic_ratio=1))
    config = from_dict(DMDConfig, {"trainer": {"updates": 1, "batch_size": 2}}, config)
    result = distill(teacher, ["two"], config)
    card = (result.save(tmp_path / "mine") / "README.md").read_text()
    assert "# mine" in card
    assert "from Python" in card
    assert result.save(tmp_path / "other", "my own card").joinpath("README.md").read_text() == "my own card"


def test_without_a_teachers_card_the_licence_is_unknown(result):
    card = student_card("student", result.facts)
    assert "Licence: the teacher's, unknown here" in card
    assert "license" not in yaml.safe_load(card.split("---\n")[1])


def test_a_student_that_the_engine_cannot_run_is_not_said_to(result):
    for change in ({"network": "StackedUNet"}, {"scheduler": "FlowMatchEulerDiscreteScheduler"}):
        assert "OneStepPipeline" not in student_card("student", result.facts | change)
    assert set(card_module._ENGINE_SCHEDULERS) == set(_FAMILIES)


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: own-licence\n---\n", "own-licence"),
        ("# no front matter", None),
        ("---\nlicense: [a\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
    ],
)
def test_a_licence_is_read_from_the_front_matter_of_a_card(text, licence, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == licence


def test_no_card_and_no_folder_have_no_licence(tmp_path):
    assert licence_of(tmp_path) is None
    assert licence_of(None) is None


def test_the_commit_is_that_of_the_packages_own_clone(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    package = tmp_path / "fastdistill"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(fastdistill, "__file__", str(package / "__init__.py"))
    assert package_commit() is None
    git("init", "-q")
    assert package_commit() is None  # installed in somebody's repository, not tracked there
    git("add", ".")
    git("commit", "-qm", "first")
    assert package_commit() == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("changed = True")
    assert package_commit() == git("rev-parse", "HEAD") + " + changes"


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (torch.float16, 1e5, "conv_out.bias cannot be saved as float16: it holds 100000, and float16 ends at 65504"),
        (torch.bfloat16, 3.4e38, "conv_out.bias cannot be saved as bfloat16: .* export it as float32"),
    ],
)
def test_a_weight_that_a_dtype_cannot_hold_is_named_and_nothing_is_written(dtype, value, message, tmp_path):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] = value
    with pytest.raises(ValueError, match=message):
        save_pipeline(pipeline, tmp_path / "student", {}, dtype=dtype)
    assert not list(tmp_path.iterdir())
    save_pipeline(pipeline, tmp_path / "student", {}, dtype=torch.float32)
    kept = DiffusionPipeline.from_pretrained(tmp_path / "student").unet.conv_out.bias
    assert kept[0].item() == np.float32(value)
