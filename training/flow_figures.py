"""The figures of InstaFlow's paper (arXiv 2309.06380) on the digits: few steps of a rectified flow, and its guidance.

    python -m fastdistill.training.flow_figures steps FLOW --write docs/instaflow.md --picture docs/images/instaflow.png
    python -m fastdistill.training.flow_figures students FOLDER… --write docs/instaflow.md

FLOW is a pipeline folder of the method reflow; a few minutes of one core. The others are of the method instaflow.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastdistill.models.digits.figures import interval, write_between_marks
from fastdistill.models.digits.metrics import score
from fastdistill.models.digits.sampling import balanced_labels
from fastdistill.models.digits.students import Student, measure_students
from fastdistill.models.digits.text import prompt

from .pipelines import FACTS_FILE
from .solvers import solve
from .teacher import Teacher

COMMAND = "python -m fastdistill.training.flow_figures"
STEPS_MARKS = ("<!-- flow: begin -->", "<!-- flow: end -->")
STUDENTS_MARKS = ("<!-- runs: begin -->", "<!-- runs: end -->")
STEPS = (1, 2, 4, 8, 25)
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
FLOW_STEPS, TEACHER_STEPS = 4, 8  # of the guidance sweep


@dataclass(frozen=True)
class Sampler:
    """A model of the digits and how it is sampled; `label` is its line in the plot."""

    label: str
    model: Teacher
    solver: str


@dataclass(frozen=True)
class Row:
    """Scores of 1000 images of one sampler."""

    label: str
    steps: int
    guidance_scale: float
    fd: float
    accuracy: float
    diversity: float


def sample(
    model: Teacher, labels: Tensor, *, solver: str, steps: int, guidance_scale: float = 1.0, seed: int = 0
) -> Tensor:
    """Images (N, 3, 32, 32) in about [-1, 1]; image i of a seed starts from the same noise for every sampler."""
    noise = torch.randn(len(labels), *model.sample_shape, generator=torch.Generator().manual_seed(seed))
    condition = model.encode([prompt(int(label)) for label in labels])
    options = {"solver": solver, "steps": steps, "guidance_scale": guidance_scale}
    if guidance_scale != 1:
        options["unconditional"] = model.unconditional
    images = []
    for part in torch.arange(len(labels)).split(250):
        latents = solve(
            model.unet, noise[part].to(model.device), condition[part], model.schedule, model.prediction_type, **options
        )
        with torch.no_grad():
            images.append(model.decode(latents).cpu())
    return torch.cat(images)


def measure(
    flow: Teacher, teacher: Teacher, log: Callable[[str], None] = print, *, per_digit: int = 100
) -> tuple[list[Row], list[Row]]:
    """Scores over the number of steps, and over guidance."""
    samplers = (
        Sampler("2-rectified flow, Euler", flow, "euler"),
        Sampler("teacher, DPM-Solver++", teacher, "dpmpp"),
        Sampler("teacher, Euler", teacher, "euler"),
    )
    labels = balanced_labels(per_digit)

    def row(sampler: Sampler, steps: int, guidance_scale: float = 1.0) -> Row:
        images = sample(sampler.model, labels, solver=sampler.solver, steps=steps, guidance_scale=guidance_scale)
        scores = score(images, labels)
        log(f"{sampler.label}, {steps} steps, guidance {guidance_scale}: FD {scores.fd:.3f}")
        return Row(sampler.label, steps, guidance_scale, scores.fd, scores.accuracy, scores.diversity)

    over_steps = [row(sampler, steps) for sampler in samplers for steps in STEPS]
    over_guidance = [
        row(sampler, steps, scale)
        for sampler, steps in zip(samplers, (FLOW_STEPS, TEACHER_STEPS))
        for scale in GUIDANCE_SCALES
    ]
    return over_steps, over_guidance


def as_markdown(over_steps: Sequence[Row], over_guidance: Sequence[Row]) -> str:
    """Two tables: a line per sampler, FD / accuracy in the cells."""
    lines = ["| FD / accuracy at steps |" + "".join(f" {steps} |" for steps in STEPS), "|---" * (len(STEPS) + 1) + "|"]
    lines += [_line(rows) for rows in _by_label(over_steps)]
    lines += ["", "| FD / accuracy / diversity at guidance |" + "".join(f" {scale} |" for scale in GUIDANCE_SCALES)]
    lines += ["|---" * (len(GUIDANCE_SCALES) + 1) + "|"]
    lines += [_line(rows, f", {rows[0].steps} steps", with_diversity=True) for rows in _by_label(over_guidance)]
    return "\n".join(lines)


def draw(over_steps: Sequence[Row], over_guidance: Sequence[Row], picture: Path) -> None:
    """Write a PNG: Frechet distance over steps, and against accuracy along the guidance scales.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the picture needs matplotlib: pip install "fastdistill[bench]"') from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for rows in _by_label(over_steps):
        left.plot([row.steps for row in rows], [row.fd for row in rows], marker="o", label=rows[0].label)
    left.set(xscale="log", yscale="log", xlabel="steps", ylabel="Frechet distance", xticks=STEPS, title="no guidance")
    left.set_xticks(STEPS, map(str, STEPS))
    left.set_xticks([], minor=True)
    for rows in _by_label(over_guidance):
        label = f"{rows[0].label}, {rows[0].steps} steps"
        right.plot([row.diversity for row in rows], [row.fd for row in rows], marker="o", label=label)
        for row in rows:
            right.annotate(f"{row.guidance_scale:g}", (row.diversity, row.fd), (4, 4), textcoords="offset points")
    right.set(xlabel="diversity (real digits: 1)", ylabel="Frechet distance", title="guidance scale at the points")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def _by_label(rows: Sequence[Row]) -> list[list[Row]]:
    return [[row for row in rows if row.label == label] for label in dict.fromkeys(row.label for row in rows)]


def _line(rows: Sequence[Row], more: str = "", with_diversity: bool = False) -> str:
    diversity = (lambda row: f" / {row.diversity:.2f}") if with_diversity else (lambda row: "")
    cells = "".join(f" {row.fd:.3f} / {row.accuracy:.3f}{diversity(row)} |" for row in rows)
    return f"| {rows[0].label}{more} |{cells}"


def students_as_markdown(students: Sequence[Student]) -> str:
    """A row per student of the method instaflow, and one of the means for each number of rectifications."""
    lines = [
        "| student | training seed | updates | straightness before, after | Frechet distance | accuracy | diversity |",
        "|---|---|---|---|---|---|---|",
    ]
    for rectifications in sorted({_rectifications(student) for student in students}):
        runs = [student for student in students if _rectifications(student) == rectifications]
        runs.sort(key=lambda student: student.seed)
        name = f"{rectifications} x reflow, then one step" if rectifications else "one step directly"
        for run in runs:
            measured = run.facts.get("figures", {}).get("straightness", {}).values()
            shown = ", ".join(f"{value:.4f}" for value in measured)
            figures = f"{run.fd:.3f} | {run.accuracy:.3f} | {run.diversity:.3f}"
            lines.append(f"| {name} | {run.seed} | {_updates(run)} | {shown} | {figures} |")
        if len(runs) > 1:
            means = [interval([getattr(run, figure) for run in runs]) for figure in ("fd", "accuracy", "diversity")]
            lines.append(f"| **{name}** | **{len(runs)} seeds** | | | {' | '.join(means)} |")
    return "\n".join(lines)


def _rectifications(student: Student) -> int:
    return student.facts["config"]["reflow"]["rectifications"]


def _updates(student: Student) -> int:
    """Of all stages: what a student may be compared with another at."""
    config = student.facts["config"]
    reflow = _rectifications(student) * config["reflow"]["trainer"]["updates"]
    return reflow + config["trainer"]["updates"] + config["lpips_updates"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 2 with one clear line for bad input or a missing extra."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ImportError, ValueError, OSError) as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="InstaFlow's figures on the digits.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    few = commands.add_parser("steps", help="a rectified flow in few steps and under guidance, beside its teacher")
    few.add_argument("flow", help="pipeline folder of the method reflow")
    few.add_argument("--teacher", default="digits-teacher", help="bundled name or pipeline folder")
    few.add_argument("--picture", type=Path, metavar="PNG", help="draw it")
    few.set_defaults(run=_steps)

    students = commands.add_parser("students", help="one-step students with and without reflow, over training seeds")
    students.add_argument("folders", nargs="+", help="pipeline folders of the method instaflow")
    students.add_argument("--noise-seeds", type=int, nargs="+", default=[0, 1, 2])
    students.set_defaults(run=_students)

    for command in (few, students):
        command.add_argument("--write", type=Path, metavar="FILE", help="put the tables between the marks of this file")
    return parser


def _steps(options: argparse.Namespace) -> None:
    rows = measure(Teacher(options.flow), Teacher(options.teacher), _log)
    told = f"`{COMMAND} steps {options.flow}`: 1000 images per cell, 100 of each digit"
    _publish(f"Printed by {told}.\n\n{as_markdown(*rows)}", options.write, STEPS_MARKS)
    if options.picture:
        draw(*rows, options.picture)


def _students(options: argparse.Namespace) -> None:
    for folder in map(Path, options.folders):
        file = folder / FACTS_FILE
        if not file.is_file() or json.loads(file.read_text(encoding="utf-8")).get("method") != "instaflow":
            raise ValueError(f"{folder}: needed a student of the method instaflow, with its {FACTS_FILE}")
    students = measure_students(options.folders, options.noise_seeds, _log)
    seeds = ", ".join(map(str, options.noise_seeds))
    told = (
        f"`{COMMAND} students {' '.join(options.folders)}`: one step, 1000 images per seed of the noise, of which a "
        f"run's figures are the means (noise seeds {seeds}); in bold mean ± half of the 95 % confidence interval over "
        "the training seeds (Student's t)"
    )
    _publish(f"Printed by {told}.\n\n{students_as_markdown(students)}", options.write, STUDENTS_MARKS)


def _publish(text: str, file: Path | None, marks: tuple[str, str]) -> None:
    print(text)
    if file is not None:
        write_between_marks(file, text, marks)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
