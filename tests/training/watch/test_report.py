"""The report: HTML that a parser closes, with every picture inside and the figures of the log in it."""

import base64
import io
import itertools
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from fastdistill.training import DMDConfig, TrainerConfig
from fastdistill.training.settings import to_yaml
from fastdistill.training.watch import RunFacts, plot_png, record, render_report, sheet
from fastdistill.training.watch.plots import DAY, NIGHT
from fastdistill.training.watch.report import Shown
from PIL import Image

from .toys import a_report

PROMPTS = ["a handwritten <seven>", "two & three"]
CONFIG = DMDConfig(trainer=TrainerConfig(updates=100, seed=1234))


class Page(HTMLParser):
    VOID = ("meta", "img", "source", "link", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def content(address):
    kind, data = address.split(",")
    assert kind == "data:image/png;base64"
    return base64.b64decode(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    lines, pictures = [], []
    for stage in ("reflow", "distillation"):
        for update in range(0, 101, 10):
            path = folder / f"{stage}-{update}.png"
            sheet(torch.full((20, 3, 64, 64), update / 50 - 1)).save(path)
            pictures.append(Shown(stage, update, path))
            if update:
                lines.append(
                    record(
                        a_report(
                            update,
                            stage,
                            losses={"flow": 17.25 / update},
                            skipped={"student": 3 if stage == "reflow" else 0},
                            validation={"fd": 0.4321 + update / 1000, "accuracy": 0.987},
                            validated=update,
                            best=10,
                            peak_bytes=1_234_000_000,
                        )
                    )
                )
    path = folder / "teacher.png"
    sheet(torch.zeros(20, 3, 64, 64)).save(path)
    return lines, [Shown("teacher", None, path), *pictures]


@pytest.fixture(scope="module")
def page(run):
    lines, pictures = run
    drawn = [plot_png(lines[:10], "losses", each) for each in (DAY, NIGHT)]
    facts = RunFacts(
        CONFIG,
        teacher="digits-teacher",
        teacher_steps=25,
        out="my-student",
        command="fastdistill train dmd --set a<b",
        sampling={"steps": 4, "guidance_scale": 1.0},
        delivered={"distillation": 70},
    )
    left_out = ["pictures: OutOfMemoryError: <no room>"]
    return Page(render_report(lines, facts, pictures, PROMPTS * 10, {("reflow", "losses"): drawn}, left_out))


def test_everything_is_inside_the_page(page):
    for attributes in page.all("img"):
        Image.open(io.BytesIO(content(attributes["src"]))).verify()
    for attributes in page.all("source"):
        Image.open(io.BytesIO(content(attributes["srcset"]))).verify()
    assert page.all("script") == page.all("link") == page.all("iframe") == []
    assert "http" not in " ".join(str(attributes) for _, attributes in page.tags)


def test_pictures_are_those_of_the_run_from_teacher_to_the_last_update(page, run):
    shown = [np.asarray(Image.open(io.BytesIO(content(a["src"])))) for a in page.all("img") if a["class"] == "sheet"]
    chosen = [
        0,
        *(1 + u // 10 for u in (0, 20, 40, 60, 80, 100)),
        *(12 + u // 10 for u in (0, 20, 40, 60, 70, 80, 100)),
    ]
    assert len(shown) == len(chosen)
    for pixels, index in zip(shown, chosen):
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(run[1][index].path)))


def test_every_picture_says_in_words_what_it_shows(page):
    words = [attributes["alt"] for attributes in page.all("img")]
    assert words[0] == "20 samples of the teacher in 25 steps: a handwritten <seven>, two & three"
    assert "the student before its first update of reflow" in words[1]
    assert any("after 70 updates of distillation, delivered" in each for each in words)
    assert "flow: 1.725 at update 10, 0.1725 at update 100, between 0.1725 and 1.725." in words[-1]


def test_figures_are_those_of_the_log(page):
    for figure in ("0.172", "1.73", "0.442", "0.532", "0.987", "1.23 GB", "3 min 20 s", "100 of 100"):
        assert figure in page.text, figure
    assert "reflow: 3 updates of student were left out" in page.text
    assert "pictures: OutOfMemoryError: <no room>" in page.text


def test_it_tells_how_the_student_is_sampled_and_how_it_was_made(page):
    assert 'DiffusionPipeline.from_pretrained("my-student")' in page.text
    assert "num_inference_steps=4" in page.text
    assert 'fastdistill generate "a prompt" --model my-student --steps 4' in page.text
    assert "fastdistill train dmd --set a<b" in page.text
    assert " ".join(to_yaml(CONFIG).split()) in page.text
    assert "seed: 1234" in page.text
    assert f"torch {torch.__version__}" in page.text


def test_headings_and_tables_are_for_readers_who_only_hear_them(page):
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all("scope" in attributes for attributes in page.all("th"))
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert page.all("html") == [{"lang": "en"}]


def test_a_run_that_failed_says_so_and_needs_neither_pictures_nor_plots(run):
    line = record(a_report(40, losses={"flow": float("nan")}))
    page = Page(render_report([line], RunFacts(ended="Diverged: too many")))
    assert "The run ended with Diverged: too many" in page.text
    assert "Not finite in some reports: losses.flow." in page.text
    assert "When this was written: reflow at update 40 of 100." in page.text
    assert page.all("img") == []
