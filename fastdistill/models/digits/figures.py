"""The figures of the digits models as Markdown, measured over several seeds, and put where they are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..loading import bundled_models, load_pipeline
from .data import load_digits
from .metrics import DigitScores, score
from .sampling import balanced_labels, generate
from .train_vae import decode, encode

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
MARKS = (BEGIN, END)
TEACHER = "digits-teacher"
TEACHER_STEPS = (50, 25, 1)
STUDENT_STEPS = (1,)

Row = tuple[str, list[DigitScores]]


def measure(seeds: Sequence[int], models: Sequence[str] | None = None, log: Callable[[str], None] = print) -> list[Row]:
    """Scores of the real data, the autoencoder and each model, one `DigitScores` per seed.

    Args:
        seeds: of the noise, and of the draw of real digits; two or more give a confidence.
        models: bundled names or folders; None is every bundled one. A model called `digits-teacher` is measured at
            50, 25 and 1 steps, any other at 1 step. The autoencoder is the first model's.
        log: receives a line per measurement.
    """
    names = models or sorted(bundled_models(), key=lambda name: name != TEACHER)  # the teacher first
    pipelines = {str(name): load_pipeline(name) for name in names}
    images, labels = load_digits()
    first = next(iter(pipelines.values()))
    rows = [
        ("real digits, all 1797, as 8-bit images", [score(as_saved(images), labels)]),
        ("real digits, 100 of each drawn with replacement", [_bootstrap(images, labels, seed) for seed in seeds]),
        (
            "real digits, all 1797, through the autoencoder",
            [score(decode(first.vae, encode(first.vae, images)), labels)],
        ),
    ]
    for name, pipeline in pipelines.items():
        for steps in TEACHER_STEPS if Path(name).name == TEACHER else STUDENT_STEPS:
            rows.append((f"{Path(name).name}, {steps} step{'s' * (steps > 1)}", []))
            for seed in seeds:
                wanted = balanced_labels()
                rows[-1][1].append(score(generate(pipeline, wanted, steps, seed), wanted))
                log(f"{rows[-1][0]}, seed {seed}: FD {rows[-1][1][-1].fd:.3f} accuracy {rows[-1][1][-1].accuracy:.3f}")
    return rows


def as_saved(images: torch.Tensor) -> torch.Tensor:
    """`images` in [-1, 1] rounded to the 256 levels of a PNG."""
    return ((images + 1) * 127.5).round() / 127.5 - 1


def _bootstrap(images: torch.Tensor, labels: torch.Tensor, seed: int) -> DigitScores:
    """What a perfect generator would score: as many real digits as are generated, drawn independently."""
    generator = torch.Generator().manual_seed(seed)
    members = [(labels == digit).nonzero()[:, 0] for digit in range(10)]
    drawn = torch.cat([own[torch.randint(0, len(own), (100,), generator=generator)] for own in members])
    return score(images[drawn], labels[drawn])


def as_markdown(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """The two tables of docs/digits.md: all figures, and accuracy and diversity per digit (means over the seeds)."""
    lines = [
        "1000 images, 100 of each digit, per row and seed unless the row says otherwise; "
        f"seeds {', '.join(map(str, seeds))}; mean ± half of the 95 % confidence interval (Student's t).",
        "",
        "| images | Frechet distance | accuracy | diversity |",
        "|---|---|---|---|",
    ]
    for name, scores in rows:
        figures = [interval([getattr(one, figure) for one in scores]) for figure in ("fd", "accuracy", "diversity")]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    digits = " | ".join(map(str, range(10)))
    for title, figure in (("accuracy", "accuracy_per_digit"), ("diversity", "diversity_per_digit")):
        lines += ["", f"| {title} per digit | {digits} |", "|---" * 11 + "|"]
        for name, scores in rows:
            means = torch.tensor([getattr(one, figure) for one in scores]).mean(dim=0).tolist()
            lines.append(f"| {name} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join(lines)


def interval(values: Sequence[float]) -> str:
    """`mean ± half-width` of the 95 % confidence interval; only the mean of a single value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    from scipy.stats import t

    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:.3f} ± {t.ppf(0.975, len(values) - 1) * deviation / math.sqrt(len(values)):.3f}"


def write_between_marks(file: Path, text: str, marks: tuple[str, str] = MARKS) -> None:
    """Replace what stands between the two marks in `file`.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    begin, end = marks
    content = file.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ValueError(f"{file}: needed {begin!r} and, after it, {end!r}, once each")
    head, tail = content.split(begin)[0], content.split(end)[1]
    file.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
