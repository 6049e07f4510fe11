"""Watching a run: everything is kept, nothing is changed by it, and what fails is not the run's concern."""

import io
import itertools
import json
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from fastdistill.training import DMDConfig, Teacher, World, distill
from fastdistill.training.settings import changed
from fastdistill.training.watch import Samples, sheet, watch, watching
from PIL import Image
from rich.console import Console

from ..toys import tiny_pipeline
from .toys import a_report

PROMPTS = ["a handwritten seven", "two"]
CONFIG = changed(
    DMDConfig(critic_ratio=1, regression_weight=0.0, pairs=0),
    trainer={"updates": 4, "batch_size": 2, "report_every": 1, "checkpoint_every": 2},
    student={"warm_up": 0, "learning_rate": 0.01},
    fake_score={"warm_up": 0},
)


@pytest.fixture(scope="module")
def teacher():
    return Teacher(tiny_pipeline())


@pytest.fixture
def quiet():
    return Console(file=io.StringIO(), width=200)


def updates(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["update"] for line in lines]


def weights(result):
    return list(result.run.student.state_dict().values())


def said(console):
    return console.file.getvalue()


def test_watching_does_not_change_the_weights_by_a_bit_and_keeps_everything(teacher, tmp_path, quiet):
    alone = distill(teacher, PROMPTS, CONFIG)
    folder = tmp_path / "run"
    seen = []

    def validate(student, method):
        seen.append(method.sampling()["steps"])
        return {"fd": float(len(seen))}

    config = changed(CONFIG, trainer={"validate_every": 2})
    with watch(folder, teacher=teacher, prompts=PROMPTS, config=config, picture_every=2, console=quiet) as callback:
        watched = distill(teacher, PROMPTS, config, callback=callback, validate=validate)
    assert all(map(torch.equal, weights(alone), weights(watched)))
    assert updates(folder) == [1, 2, 3, 4]
    assert seen == [1, 1]
    kept = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert kept == [
        "pictures/dmd-00000000.png",
        "pictures/dmd-00000002.png",
        "pictures/dmd-00000004.png",
        "pictures/teacher.png",
        *(f"plots/dmd-{group}.png" for group in ("gradient_norms", "learning_rates", "losses", "validation")),
    ]
    assert (folder / "report.html").read_text().count("data:image/png") == 4 + 2 * 4
    samples = Samples(teacher.pipeline, PROMPTS)
    of_end = sheet(samples.of_student(watched.run.student, watched_method().scheduler, {"steps": 1}))
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "pictures/dmd-00000004.png")), np.asarray(of_end))
    of_start = sheet(samples.of_student(teacher.unet, watched_method().scheduler, {"steps": 1}))
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "pictures/dmd-00000000.png")), np.asarray(of_start))


def watched_method():
    return a_report(1).method


def test_a_resumed_run_continues_log_and_pictures_without_a_step_twice(teacher, tmp_path, quiet, few_curves):
    folder, checkpoints = tmp_path / "run", tmp_path / "checkpoints"
    given = {"teacher": teacher, "prompts": PROMPTS, "config": CONFIG, "picture_every": 1, "console": quiet}
    with watch(folder, **given) as callback:
        distill(teacher, PROMPTS, CONFIG, callback=callback, checkpoints=checkpoints)
    whole = {path.name: path.read_bytes() for path in (folder / "pictures").iterdir()}
    for name in ("step-00000004", ".step-00000004.partial"):
        for file in (checkpoints / "dmd" / name).glob("*"):
            file.unlink()  # as if it had been killed before it was written
    with watch(folder, resume=True, **given) as callback:
        callback.begin(a_report(2, "dmd", 4, student=teacher.unet))
        assert updates(folder) == [1, 2]
        assert not (folder / "pictures/dmd-00000003.png").exists()
    with pytest.warns(UserWarning, match="refused"), watch(folder, resume=True, **given) as callback:
        distill(teacher, PROMPTS, CONFIG, callback=callback, checkpoints=checkpoints, resume=True)
    assert updates(folder) == [1, 2, 3, 4]
    assert {path.name: path.read_bytes() for path in (folder / "pictures").iterdir()} == whole


@dataclass(frozen=True)
class TwoStages(DMDConfig):
    """The same training twice; the second is of the student."""

    def stages(self, setup):
        for name in ("first", "second"):
            for stage in super().stages(setup):
                yield replace(stage, name=name, is_last=name == "second")


def test_several_stages_stand_after_one_another_also_when_the_last_is_resumed(teacher, tmp_path, quiet, few_curves):
    folder, checkpoints = tmp_path / "run", tmp_path / "checkpoints"
    config = TwoStages(**{each.name: getattr(CONFIG, each.name) for each in fields(CONFIG)})
    given = {"teacher": teacher, "prompts": PROMPTS, "config": config, "picture_every": 2, "console": quiet}

    def run(resume, stop=None):
        with watch(folder, resume=resume, **given) as callback:

            def stopping(progress):
                callback(progress)
                return (progress.stage, progress.update) == stop

            stopping.begin, stopping.end = callback.begin, callback.end
            distill(teacher, PROMPTS, config, callback=stopping, checkpoints=checkpoints, resume=resume)

    run(resume=False, stop=("second", 3))
    first = (folder / "pictures/first-00000004.png").read_bytes()
    run(resume=True)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["update"]) for line in lines] == [
        (s, u) for s in ("first", "second") for u in (1, 2, 3, 4)
    ]
    assert (folder / "pictures/first-00000004.png").read_bytes() == first
    page = (folder / "report.html").read_text()
    assert page.index("Curves of first") < page.index("Curves of second")
    assert "after 4 updates of first, delivered" in page
    assert "after 4 updates of second, delivered" in page


def test_a_picture_that_fails_is_said_once_and_the_run_goes_on(teacher, tmp_path, quiet, few_curves, monkeypatch):
    tries = itertools.count()

    def no_room(*args):
        raise torch.OutOfMemoryError(f"no room for {next(tries)} bytes")

    monkeypatch.setattr(Samples, "of_student", no_room)
    with watch(tmp_path, teacher=teacher, prompts=PROMPTS, picture_every=1, console=quiet) as callback:
        result = distill(teacher, PROMPTS, CONFIG, callback=callback)
    assert result.run.updates["student"] == 4
    assert updates(tmp_path) == [1, 2, 3, 4]
    assert next(tries) > 4
    assert said(quiet).count("no room") == 1
    assert "pictures: OutOfMemoryError: no room for 0 bytes" in (tmp_path / "report.html").read_text()


def test_a_log_that_cannot_be_written_is_said_once_and_catches_up(teacher, tmp_path, quiet, few_curves, monkeypatch):
    tries = []
    write = watching.Log.write

    def full(log, line):
        tries.append(line)
        if line["update"] < 3:
            log.path = tmp_path / "no" / "such" / "\0"
        else:
            log.path = tmp_path / "log.jsonl"
        write(log, line)

    monkeypatch.setattr(watching.Log, "write", full)
    with watch(tmp_path, console=quiet) as callback:
        distill(teacher, PROMPTS, CONFIG, callback=callback)
    assert updates(tmp_path) == [1, 2, 3, 4]
    assert said(quiet).count("log: ValueError") == 1


def test_all_processes_but_the_first_do_nothing(teacher, tmp_path, monkeypatch, capsys):
    for given in ({"world": World(1, 2)}, {}):
        monkeypatch.setenv("RANK", "1")
        with watch(tmp_path / "run", teacher=teacher, prompts=PROMPTS, **given) as callback:
            callback.begin(a_report(0))
            callback(a_report(10))
            callback.end(a_report(10))
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_an_older_log_is_neither_continued_nor_lost_by_accident(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"stage": "dmd", "update": 1}\n')
    with pytest.raises(ValueError, match="holds the log of a run; needed a new folder, or resume"):
        watch(tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == '{"stage": "dmd", "update": 1}\n'


def test_bad_arguments_are_refused_before_anything_is_made(teacher, tmp_path):
    with pytest.raises(ValueError, match="picture_every=0: needed 1 or more"):
        watch(tmp_path / "run", picture_every=0)
    with pytest.raises(ValueError, match="prompts: none"):
        watch(tmp_path / "run", teacher=teacher)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file"):
        watch(tmp_path / "file" / "run")
    assert not (tmp_path / "run").exists()


def test_without_a_folder_only_the_progress_is_shown(tmp_path, quiet, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with watch(console=quiet) as callback:
        callback(a_report(100))
    assert "reflow updates 100/100" in said(quiet)
    assert list(tmp_path.iterdir()) == []


def test_the_report_shows_the_student_that_is_delivered(teacher, tmp_path, quiet, few_curves):
    config = changed(CONFIG, trainer={"validate_every": 1, "deliver": "best"})
    scores = iter([3.0, 1.0, 2.0, 4.0])
    with watch(tmp_path, teacher=teacher, prompts=PROMPTS, config=config, picture_every=4, console=quiet) as callback:
        result = distill(
            teacher, PROMPTS, config, callback=callback, validate=lambda student, method: {"fd": next(scores)}
        )
    assert result.run.best == 2
    picture = np.asarray(Image.open(tmp_path / "pictures/dmd-00000002.png"))
    samples = Samples(teacher.pipeline, PROMPTS)
    of_best = sheet(samples.of_student(result.run.student, watched_method().scheduler, {"steps": 1}))
    np.testing.assert_array_equal(picture, np.asarray(of_best))
    assert "after 2 updates, delivered" in (tmp_path / "report.html").read_text()


def test_the_report_names_the_error_that_ended_a_run(tmp_path, quiet, few_curves):
    def run():
        with watch(tmp_path, console=quiet) as callback:
            callback(a_report(10))
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        run()
    assert "The run ended with RuntimeError: out of luck" in (tmp_path / "report.html").read_text()
