"""What the bundled digits add to a run: their prompts, their model card, their figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from .dmd import DMDConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdistill.models.digits.metrics import DigitScores


def digits_prompts() -> list[str]:
    """Every caption of the ten digits, as words and as numerals."""
    from fastdistill.models.digits.text import captions

    return [caption for digit in range(10) for caption in captions(digit)]


def digits_card(name: str, config: DMDConfig) -> str:
    """The model card of a student of the digits, with the command that reproduces it and a place for its figures."""
    from fastdistill.models.digits.cards import student_card

    return student_card(
        name,
        summary="One-step handwritten digits, distilled from `digits-teacher` by distribution matching (DMD).",
        command=_command(name, config),
        method=(
            "Distribution matching distillation (arXiv 2311.18828), with more updates of the fake score than of the\n"
            "student (arXiv 2405.14867). No training image is used: only the teacher, a fake score that follows the\n"
            "student, and a set of noises carried along the teacher's ODE. The student takes one step from pure\n"
            "noise at t = 999, without guidance. Every setting stands in `fastdistill.json`."
        ),
    )


def digits_scores(pipeline: DiffusionPipeline, seeds: range = range(3)) -> Iterator[tuple[int, DigitScores]]:
    """(seed, scores) of 1000 images in one step, for each seed of the noise."""
    from fastdistill.models.digits.metrics import score
    from fastdistill.models.digits.sampling import balanced_labels, generate

    labels = balanced_labels()
    for seed in seeds:
        yield seed, score(generate(pipeline, labels, steps=1, seed=seed), labels)


def _command(name: str, config: DMDConfig) -> str:
    defaults = DMDConfig()
    given = {field.name: getattr(config, field.name) for field in fields(config)}
    settings = [
        f"--set {key}={value}"
        for key, value in given.items()
        if key not in ("iterations", "seed") and value != getattr(defaults, key)
    ]
    size = f"--iterations {config.iterations} --seed {config.seed}"
    return " ".join(["python -m fastdistill.training dmd --teacher digits-teacher --out", name, size, *settings])
