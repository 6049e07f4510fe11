"""What the bundled digits add to a run: their prompts, their model card, their figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from .data import LatentData
from .dmd import DMDConfig
from .teacher import Teacher

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdistill.models.digits.metrics import DigitScores


def digits_prompts() -> list[str]:
    """Every caption of the ten digits, as words and as numerals."""
    from fastdistill.models.digits.text import captions

    return [caption for digit in range(10) for caption in captions(digit)]


def digits_images(teacher: Teacher, *, seed: int = 0, batch_size: int = 256) -> LatentData:
    """The 1797 real digits with their pixels (1797, 3, 32, 32) and latents, the autoencoder's means.

    A digit is called by any of its captions, one drawn each time; the conditions are those of `digits_prompts()`, in
    their order.

    Args:
        teacher: of the digits, or any whose autoencoder takes 32x32 images.
        seed: of the order.
        batch_size: images encoded at once.

    Raises:
        ImportError: scikit-learn, which carries the data, is not installed.
    """
    from fastdistill.models.digits.data import load_digits
    from fastdistill.models.digits.text import captions

    digits = load_digits()
    images = digits.images.expand(-1, 3, -1, -1).to(teacher.device).contiguous()
    latents = torch.cat([teacher.encode_images(some) for some in images.split(batch_size)])
    per_digit = len(captions(0))
    of_each = digits.labels[:, None] * per_digit + torch.arange(per_digit)  # (1797, K)
    conditions = teacher.encode(digits_prompts())
    return LatentData(latents, conditions, of_each.to(teacher.device), images=images, seed=seed)


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
