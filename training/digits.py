"""What the bundled digits add to a run: their prompts, their model card, their figures."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .card import about_method
from .data import LatentData
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


def digits_card(name: str, command: str, facts: Mapping[str, Any]) -> str:
    """The model card of a student of the digits, with the command that makes it again and a place for its figures."""
    from fastdistill.models.digits.cards import student_card

    steps, timestep = facts["sampling"]["steps"], facts["sampling"]["timestep"]
    taken = "one step" if steps == 1 else f"{steps} steps"
    data = (
        "the real digits"
        if facts.get("run", {}).get("images", {}).get("source")
        else "no image beside what the teacher has seen"
    )
    method = (
        f"{about_method(facts['method'])} The student takes {taken} from pure noise at t = {timestep}, without "
        f"guidance; it was given {data}. Every setting stands in `fastdistill.json`."
    )
    return student_card(
        name,
        summary=f"Handwritten digits in {taken}, distilled from `{facts['teacher']['name']}`.",
        command=command,
        method=textwrap.fill(method, 110),
        steps=steps,
    )


def digits_scores(
    pipeline: DiffusionPipeline, seeds: Iterable[int] = range(3), steps: int = 1
) -> Iterator[tuple[int, DigitScores]]:
    """(seed, scores) of 1000 images in `steps` steps, for each seed of the noise."""
    from fastdistill.models.digits.metrics import score
    from fastdistill.models.digits.sampling import balanced_labels, generate

    labels = balanced_labels()
    for seed in seeds:
        yield seed, score(generate(pipeline, labels, steps=steps, seed=seed), labels)
