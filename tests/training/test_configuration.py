"""The run files of the documentation and the examples are what the parser reads."""

import re
from pathlib import Path

import pytest
from fastdistill.training.plan import plan
from fastdistill.training.registry import METHODS
from fastdistill.training.run import command, load_run, read_prompts
from fastdistill.training.settings import changed

from .toys import tiny_pipeline

pytestmark = pytest.mark.compiler  # they stand in the sources
ROOT = Path(__file__).resolve().parents[2]
DOCUMENTED = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "configuration.md").read_text(), re.DOTALL)
EXAMPLES = {path.stem.removeprefix("train-"): path for path in (ROOT / "examples").glob("train-*.yaml")}


def read(text, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return load_run(file=file)


def test_every_method_has_an_example_that_is_read_as_its_own():
    assert set(EXAMPLES) == set(METHODS)
    for method, path in EXAMPLES.items():
        run = load_run(method, path)
        assert run.out.name.endswith({"reflow": "2rf"}.get(method, method))
        assert f"fastdistill train {method} --config {path.name}" in path.read_text()


@pytest.mark.parametrize("text", DOCUMENTED)
def test_the_documented_files_are_read(text, tmp_path):
    run = read(text, tmp_path)
    assert run.out is not None
    assert read_prompts(run.prompts)
    assert f"fastdistill train {run.method.method} " in command(run)


def test_the_documented_files_are_of_every_method(tmp_path):
    assert {read(text, tmp_path).method.method for text in DOCUMENTED} == set(METHODS)


def test_the_documented_commands_are_of_every_method_and_have_its_defaults():
    lines = re.findall(
        r"^fastdistill train (\w+) +(--teacher .*)$", (ROOT / "docs" / "configuration.md").read_text(), re.M
    )
    assert {method for method, _ in lines} == set(METHODS)
    for method, words in lines:
        pairs = words.split()
        options = {name[2:]: value for name, value in zip(pairs[::2], pairs[1::2])}
        run = load_run(method, **options)
        assert command(run) == f"fastdistill train {method} " + " ".join(_in_order(options))


def _in_order(options):
    for name in ("teacher", "prompts", "images", "out", "seed"):
        if name in options:
            yield from (f"--{name}", options[name])


@pytest.mark.parametrize("number", [0, 2])
def test_the_documented_runs_of_dmd_can_be_planned(number, tmp_path):
    run = read(DOCUMENTED[number], tmp_path)
    assert run.method.method == "dmd"
    small = changed(run.method, trainer={"batch_size": 2}, pair_steps=2)
    (stage,) = plan(tiny_pipeline(), ["a handwritten seven"], small).stages
    assert stage.updates == run.method.trainer.updates
