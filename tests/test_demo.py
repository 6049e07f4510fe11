"""The demo: that its rows are what they say, that its page needs nothing else, and that nothing is half-written."""

import base64
import dataclasses
import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from fastdistill.training import TrainingProgress
from fastdistill.training.settings import changed
from PIL import Image
from typer.testing import CliRunner

from fastdistill import OneStepPipeline, demo
from fastdistill.cli import app
from fastdistill.demo import live, words
from fastdistill.models.digits.data import load_digits
from fastdistill.models.digits.metrics import DigitScores, score
from fastdistill.models.digits.text import prompt

VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Every tag with its attributes, and whether all of them were closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def picture(attributes):
    kind, content = attributes["src"].split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def samples_from(start):
    """Real digits in place of a model's: (100, 32, 32) uint8, sample i is a digit i % 10."""
    images, labels = load_digits()
    of_digit = [images[labels == digit, 0] for digit in range(10)]
    chosen = torch.stack([of_digit[i % 10][start + i // 10] for i in range(100)])
    return ((chosen + 1) * 127.5).round().byte().numpy()


def a_row(name, steps, median, fd, start):
    scores = DigitScores(fd, 0.9834, 0.9123, (0.9834,) * 10, (0.9123,) * 10)
    return demo.Row(name, f"note of {name}", steps, samples_from(start), (median - 1, median, median + 1), scores)


@pytest.fixture(scope="module")
def result():
    return demo.DemoResult(
        rows=(
            a_row("Teacher", 25, 104.4, 0.314, 0),
            a_row("Teacher", 1, 5.44, 3.412, 10),
            a_row("Student", 1, 5.22, 0.583, 20),
        ),
        images=1000,
        timed=30,
        seed=7,
        machine={"processor": "Abacus <9>", "cores": 8, "threads": 4, "system": "Linux x86_64", "device": "the CPU"},
        versions={"fastdistill": "1.2.3", "torch": "9.8.7"},
        command="fastdistill demo --out 'a & b'",
        date="2026-01-02 03:04 UTC",
        seconds=83.0,
    )


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere(result):
    html = demo.render_html(result)
    page = Page(html)
    assert "http" not in html
    assert "//" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert "@import" not in html
    assert "url(" not in html
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("a")
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in page.all("img"))


def test_the_page_shows_the_digits_of_every_row_and_a_hundred_of_three(result):
    images = [picture(attributes) for attributes in Page(demo.render_html(result)).all("img")]
    assert len(images) == 3 * 10 + 3
    expected = np.concatenate([row.samples[:10] for row in result.rows])
    np.testing.assert_array_equal(images[:30], expected)
    for wall, row in zip(images[30:], result.rows):
        assert wall.shape == (374, 374)
        np.testing.assert_array_equal(wall[2 * 38 : 2 * 38 + 32, 5 * 38 : 5 * 38 + 32], row.samples[25])


def test_every_picture_has_a_text_for_those_who_cannot_see_it(result):
    assert all(attributes.get("alt") for attributes in Page(demo.render_html(result)).all("img"))


def test_the_page_says_the_figures_the_machine_and_the_command(result):
    text = Page(demo.render_html(result)).text
    for figure in ("20", "104", "5.2", "0.31", "3.41", "0.58", "98.3 %", "0.91", "1000 images", "30 images"):
        assert figure in text
    for fact in (
        "Abacus <9>",
        "4 of 8 cores",
        "torch 9.8.7",
        "fastdistill 1.2.3",
        result.command,
        result.date,
        "1 min 23 s",
    ):
        assert fact in text


def test_the_page_has_a_dark_side_and_fits_small_screens(result):
    html = demo.render_html(result)
    assert "prefers-color-scheme: dark" in html
    assert "max-width: 820px" in html
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in Page(html).all("meta")


def test_a_row_that_was_trained_just_now_is_shown_with_its_training(result):
    trained = dataclasses.replace(
        result,
        rows=(*result.rows[:2], a_row("Distilled just now", 1, 5.4, 1.2, 30), result.rows[2]),
        training=demo.Training("DMD", 142, 61.0),
    )
    page = Page(demo.render_html(trained))
    assert len(page.all("img")) == 4 * 10 + 3
    assert "Distilled just now, 1 step" in page.text
    assert "DMD, 142 updates of the student in 1 min 01 s" in page.text
    assert "Distilled just now" not in Page(demo.render_html(result)).text


def test_times_that_scatter_come_with_a_warning(result):
    busy = dataclasses.replace(result.rows[0], milliseconds=(62.0, 780.0, 4698.0))
    disturbed = dataclasses.replace(result, rows=(busy, *result.rows[1:]))
    assert "not to be relied on" in Page(demo.render_html(disturbed)).text
    assert "not to be relied on" in demo.warning(disturbed)
    assert "not to be relied on" not in Page(demo.render_html(result)).text
    assert demo.warning(result) == ""


def test_only_the_time_after_the_first_update_counts(monkeypatch):
    """However long the teacher takes to solve its ODE, the student gets its time."""
    ended = []

    def fake(teacher, prompts, config, *, callback, device):
        for update, seconds in enumerate((1.0, 2.0, 3.5), start=1):
            ended.append(callback(TrainingProgress("dmd", update, config.trainer.updates, seconds, {}, {}, {}, None)))
        raise StopIteration

    monkeypatch.setattr(live, "distill", fake)
    seen = []
    with pytest.raises(StopIteration):
        live.distil_live("t", 3.0, 0, torch.device("cpu"), lambda what, done, total: seen.append(done))
    assert ended == [False, False, True]
    assert seen == [0, 1.0, 2.0, 3.0]


# ---- the picture ----------------------------------------------------------------------------------------------------


def test_the_picture_shows_every_digit_as_ink_on_paper(result):
    sheet = demo.render_sheet(result).convert("L")
    assert sheet.width == 2000
    from fastdistill.demo.sheet import DIGIT, LABEL, LEADING, MARGIN, PITCH, ROW, TOP

    for index, row in enumerate(result.rows):
        for sample in range(20):
            left = MARGIN + LABEL + sample % 10 * PITCH
            top = TOP + index * ROW + (ROW - DIGIT - LEADING) // 2 + sample // 10 * LEADING
            shown = sheet.crop((left, top, left + DIGIT, top + DIGIT)).resize((32, 32), Image.Resampling.BOX)
            correlation = np.corrcoef(np.asarray(shown).ravel(), row.samples[sample].ravel())[0, 1]
            assert correlation < -0.97


def test_the_picture_grows_by_a_row(result):
    more = dataclasses.replace(result, rows=(*result.rows, result.rows[-1]))
    heights = [demo.render_sheet(some).height for some in (result, more)]
    assert heights[1] - heights[0] == 264


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.834, "0.83"), (4.21, "4.2"), (9.98, "10.0"), (17.4, "17"), (153.2, "153"), (12345.0, "12,345")],
)
def test_figures_have_two_or_three_digits(value, text):
    assert words.significant(value) == text


# ---- the run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_run():
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "LIVE", changed(live.LIVE, trainer={"batch_size": 4}, pairs=8, pair_steps=2))
        result = demo.run(
            teacher_steps=2,
            images=100,
            timed=2,
            seed=11,
            train="dmd",
            minutes=1e-6,
            command="the command",
            report=lambda *call: calls.append(call),
        )
    return result, calls


def test_a_run_has_the_rows_in_order(trained_run):
    result, _ = trained_run
    assert [(row.name, row.steps) for row in result.rows] == [
        ("Teacher", 2),
        ("Teacher", 1),
        ("Distilled just now", 1),
        ("Student", 1),
    ]
    assert (result.images, result.timed, result.seed, result.command) == (100, 2, 11, "the command")
    assert result.machine["device"] == ("the CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name())
    assert result.speedup == pytest.approx(result.rows[0].milliseconds[1] / result.rows[-1].milliseconds[1])
    for row in result.rows:
        low, median, high = row.milliseconds
        assert 0 < low <= median <= high
    Page(demo.render_html(result))


@pytest.mark.parametrize(
    ("index", "model", "steps"), [(0, "digits-teacher", 2), (1, "digits-teacher", 1), (3, "digits-dmd", 1)]
)
def test_the_scores_and_samples_of_a_row_are_those_of_the_engines_images(trained_run, index, model, steps):
    """Training must have left the teacher as it was, too."""
    row = trained_run[0].rows[index]
    prompts = [prompt(i % 10) for i in range(100)]
    images = OneStepPipeline.from_pretrained(model)(prompts, seed=11, steps=steps, output="pt").cpu()
    expected = score(images * 2 - 1, torch.arange(10).repeat(10))
    assert row.scores.fd == pytest.approx(expected.fd, rel=1e-6)
    assert row.scores.accuracy == expected.accuracy
    np.testing.assert_allclose(row.samples, (images.mean(dim=1) * 255).numpy(), atol=0.51)


def test_a_distillation_out_of_time_makes_one_update_and_is_near_its_teacher(trained_run):
    result, _ = trained_run
    assert result.training.method == "DMD"
    assert result.training.updates == 1
    before, after = result.rows[1].samples.astype(int), result.rows[2].samples.astype(int)
    assert 0 < np.abs(before - after).max() < 128


def test_a_run_reports_what_it_does_up_to_the_end_of_each_part(trained_run):
    _, calls = trained_run
    assert {what.split(":")[0] for what, _, _ in calls} == {
        "distilling",
        "timing",
        "Teacher, 2 steps",
        "Teacher, 1 step",
        "Distilled just now, 1 step",
        "Student, 1 step",
    }
    assert all(0 <= done <= total for _, done, total in calls)
    assert ("timing", 2, 2) in calls
    assert ("Student, 1 step: 100 images", 100, 100) in calls


def test_the_student_is_the_clear_winner(trained_run):
    """The point of the demo, on as few images as a test can afford: FD is biased upwards for all rows alike."""
    hurried, student = trained_run[0].rows[1].scores, trained_run[0].rows[-1].scores
    assert student.fd < hurried.fd / 2
    assert student.accuracy >= 0.9
    assert student.diversity > hurried.diversity + 0.3


@pytest.mark.parametrize(
    ("argument", "value", "needed"),
    [
        ("images", 90, "multiple of 10"),
        ("images", 105, "multiple of 10"),
        ("timed", 0, "1 or more"),
        ("train", "add", "dmd"),
        ("minutes", 0, "above 0"),
        ("minutes", float("nan"), "above 0"),
    ],
)
def test_a_bad_argument_is_refused_before_a_model_is_loaded(monkeypatch, argument, value, needed):
    monkeypatch.setattr(OneStepPipeline, "from_pretrained", None)
    with pytest.raises(ValueError, match=rf"{argument}=.*{needed}"):
        demo.run(**{argument: value})


def test_a_model_that_makes_other_pictures_is_refused(monkeypatch):
    class Large:
        def __call__(self, prompts, output):
            return torch.zeros(1, 3, 64, 48)

    monkeypatch.setattr(OneStepPipeline, "from_pretrained", lambda *_, **__: Large())
    with pytest.raises(ValueError, match="some-folder makes images of 48 x 64; the demo needs digits of 32 x 32"):
        demo.run("some-folder")


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["demo", *map(str, arguments)])


def test_the_command_writes_one_page_and_one_picture(run, monkeypatch, tmp_path, result):
    asked = {}

    def fake(*models, **options):
        asked.update(options, models=models)
        options["report"]("timing", 1, 2)
        return dataclasses.replace(result, command=options["command"])

    monkeypatch.setattr(demo, "run", fake)
    done = run("--out", "new/folder", "--images", 200, "--train", "dmd", "--minutes", 0.5)
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["demo.html", "demo.png"]
    assert "new/folder/demo.html" in done.stdout
    assert "0.58" in done.stdout
    assert asked["models"] == ("digits-teacher", "digits-dmd")
    assert (asked["images"], asked["train"], asked["minutes"], asked["seed"]) == (200, "dmd", 0.5, 0)
    page = (tmp_path / "new" / "folder" / "demo.html").read_text(encoding="utf-8")
    command = "fastdistill demo --out new/folder --train dmd --minutes 0.5 --images 200"
    assert command in Page(page).text
    assert Image.open(tmp_path / "new" / "folder" / "demo.png").width == 2000


def assert_refused(done, tmp_path, *parts, left=()):
    assert done.exit_code == 2, (done.exception, done.stderr)
    (line,) = done.stderr.splitlines()
    for part in parts:
        assert part in line
    assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(left)


def test_outputs_and_models_are_checked_before_anything_is_computed(run, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "run", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "full" / "demo.png").mkdir(parents=True)
    left = ("file", "full")
    assert_refused(run("--out", "file"), tmp_path, "file", "needed a folder", left=left)
    assert_refused(run("--out", "file/below"), tmp_path, "file", "needed a folder", left=left)
    assert_refused(run("--out", "full"), tmp_path, "full/demo.png", "is a folder", left=left)
    assert_refused(run("--out", "/proc/demo"), tmp_path, "/proc", "no file can be written", left=left)
    assert_refused(run("--student", "nobody"), tmp_path, "'nobody'", "digits-dmd", left=left)
    assert_refused(run("--teacher", "full"), tmp_path, "full", "model_index.json", left=left)


def test_an_unknown_method_lists_those_that_exist(run, tmp_path):
    assert_refused(run("--train", "magic"), tmp_path, "'magic'", "dmd")


def test_a_missing_extra_is_named_with_the_command_that_installs_it(run, monkeypatch, tmp_path):
    monkeypatch.setattr(OneStepPipeline, "from_pretrained", None)  # said before a model is loaded
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert_refused(run(), tmp_path, 'pip install "fastdistill[demo]"')


def test_ctrl_c_in_the_middle_writes_nothing(run, monkeypatch, tmp_path):
    def interrupted(*_, **options):
        options["report"]("timing", 1, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    done = run("--out", "new")
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "fastdistill: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_the_live_configuration_is_a_valid_one_that_only_the_clock_ends():
    assert live.LIVE.trainer.updates > 10**6
    assert live.LIVE.student.decay == 0
    assert live.LIVE.trainer.report_every == 1
