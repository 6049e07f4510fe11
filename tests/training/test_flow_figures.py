"""The figures of a rectified flow on the digits: same noises for every sampler, tables, picture, one-line errors."""

import pytest
import torch
from fastdistill.training import Teacher, flow_figures
from PIL import Image

from fastdistill.models import resolve_model
from fastdistill.models.digits.sampling import balanced_labels, generate
from fastdistill.models.digits.students import Student


@pytest.fixture(scope="module")
def teacher():
    return Teacher("digits-teacher")


def test_euler_samples_are_those_of_the_pipeline_for_the_same_seed(teacher):
    labels = balanced_labels(1)
    ours = flow_figures.sample(teacher, labels, solver="euler", steps=5, guidance_scale=2.0, seed=4)
    theirs = generate(teacher.pipeline, labels, steps=5, seed=4, guidance_scale=2.0)
    torch.testing.assert_close(ours.clamp(-1, 1), theirs, rtol=0, atol=1e-4)


def test_every_cell_is_measured_printed_and_drawn(teacher, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(flow_figures, "STEPS", (1, 2))
    monkeypatch.setattr(flow_figures, "GUIDANCE_SCALES", (1.0, 3.0))
    seen = []
    over_steps, over_guidance = flow_figures.measure(teacher, teacher, seen.append, per_digit=2)
    assert [(row.label, row.steps) for row in over_steps] == [
        (label, steps)
        for label in ("2-rectified flow, Euler", "teacher, DPM-Solver++", "teacher, Euler")
        for steps in (1, 2)
    ]
    assert [(row.steps, row.guidance_scale) for row in over_guidance] == [(4, 1.0), (4, 3.0), (8, 1.0), (8, 3.0)]
    assert len(seen) == 10
    first, last = over_steps[0], over_steps[4]
    assert (first.fd, first.accuracy) == (last.fd, last.accuracy)  # the same network, noises and single step
    table = flow_figures.as_markdown(over_steps, over_guidance)
    assert f"| teacher, Euler | {last.fd:.3f} / {last.accuracy:.3f} |" in table
    flow_figures.draw(over_steps, over_guidance, tmp_path / "deep" / "figures.png")
    with Image.open(tmp_path / "deep" / "figures.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 20


def student(seed, rectifications, fd):
    config = {
        "trainer": {"updates": 200 if rectifications else 600},
        "lpips_updates": 0,
        "reflow": {"rectifications": rectifications, "trainer": {"updates": 400}},
    }
    facts = {"config": config, "figures": {"straightness": {"1-RF": 0.09, "2-RF": 0.007}}}
    return Student("instaflow", seed, fd, 0.99, 0.9, 0.8, facts)


def test_students_with_and_without_reflow_stand_in_one_table_at_the_updates_of_all_their_stages():
    lines = flow_figures.students_as_markdown([student(1, 1, 0.3), student(0, 1, 0.2), student(0, 0, 0.5)]).splitlines()
    assert lines[2] == "| one step directly | 0 | 600 | 0.0900, 0.0070 | 0.500 | 0.990 | 0.900 |"
    assert lines[3].startswith("| 1 x reflow, then one step | 0 | 600 | 0.0900, 0.0070 | 0.200 |")
    assert lines[4].startswith("| 1 x reflow, then one step | 1 |")
    assert lines[5].startswith("| **1 x reflow, then one step** | **2 seeds** | | | 0.250 ± ")


def test_bad_input_is_one_line(capsys):
    for arguments in (["steps", "nowhere"], ["students", "nowhere"], ["students", str(resolve_model("digits-dmd"))]):
        assert flow_figures.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert arguments[1] in line
