"""What a training method makes of the digits: one-step students of several training seeds, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..loading import load_pipeline
from .figures import interval
from .metrics import score
from .sampling import balanced_labels, generate

STUDENTS = ("<!-- students: begin -->", "<!-- students: end -->")


@dataclass(frozen=True)
class Student:
    """One training run's outcome, in one step, each figure the mean over the seeds of the noise.

    `least_diverse` is the lowest diversity of a digit; `facts` is what its `fastdistill.json` says.
    """

    method: str
    seed: int
    fd: float
    accuracy: float
    diversity: float
    least_diverse: float
    facts: dict


def measure_students(
    folders: Sequence[str | Path], noise_seeds: Sequence[int], log: Callable[[str], None] = print
) -> list[Student]:
    """Scores of the students in these pipeline folders, 1000 images per seed of the noise.

    Raises:
        ValueError: a folder without the facts that training writes beside a student.
    """
    students = []
    for folder in map(Path, folders):
        file = folder / "fastdistill.json"
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            method, seed = facts["method"], facts["config"]["trainer"]["seed"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: needed a student that was trained here, with {file.name} ({error})") from error
        pipeline, labels = load_pipeline(folder), balanced_labels()
        found = [score(generate(pipeline, labels, steps=1, seed=noise), labels) for noise in noise_seeds]

        def mean(figure: Callable, found: list = found) -> float:
            return sum(map(figure, found)) / len(found)

        students.append(
            Student(
                method,
                seed,
                mean(lambda scores: scores.fd),
                mean(lambda scores: scores.accuracy),
                mean(lambda scores: scores.diversity),
                min(min(scores.diversity_per_digit) for scores in found),
                facts,
            )
        )
        log(f"{folder}: FD {students[-1].fd:.3f} accuracy {students[-1].accuracy:.3f}")
    return students


def as_markdown(students: Sequence[Student], noise_seeds: Sequence[int]) -> str:
    """A row per training run and, for every method, one of the means over its training seeds."""
    lines = [
        "one step, 1000 images per seed of the noise, of which a run's figures are the means (noise seeds "
        f"{', '.join(map(str, noise_seeds))}); the rows in bold are mean ± half of the 95 % confidence interval over "
        "the training seeds (Student's t).",
        "",
        "| method | training seed | updates | Frechet distance | accuracy | diversity | least diverse digit |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(student.method for student in students):
        runs = sorted((student for student in students if student.method == method), key=lambda student: student.seed)
        for run in runs:
            updates = ", ".join(f"{count} of {role}" for role, count in run.facts["updates"].items())
            figures = f"{run.fd:.3f} | {run.accuracy:.3f} | {run.diversity:.3f} | {run.least_diverse:.2f}"
            lines.append(f"| {method} | {run.seed} | {updates} | {figures} |")
        if len(runs) > 1:
            means = [interval([getattr(run, figure) for run in runs]) for figure in ("fd", "accuracy", "diversity")]
            least = min(run.least_diverse for run in runs)
            lines.append(f"| **{method}** | **{len(runs)} seeds** | | {' | '.join(means)} | {least:.2f} |")
    return "\n".join(lines)
