"""Makes, times and scores the digits of each row."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from fastdistill import OneStepPipeline
from fastdistill.info import collect_versions, machine
from fastdistill.models.digits.data import load_originals
from fastdistill.models.digits.metrics import score
from fastdistill.models.digits.sampling import balanced_labels
from fastdistill.models.digits.text import prompt

from .live import METHODS, distil_live
from .result import DemoResult, Row, Training

BATCH = 100
SHOWN = 100  # samples of each row that are kept for the page

Report = Callable[[str, float, float], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def run(
    teacher: str | Path = "digits-teacher",
    student: str | Path = "digits-dmd",
    *,
    teacher_steps: int = 25,
    images: int = 1000,
    timed: int = 30,
    seed: int = 0,
    train: str | None = None,
    minutes: float = 1.0,
    device: str | None = None,
    command: str = "fastdistill demo",
    report: Report = lambda what, done, total: None,
) -> DemoResult:
    """Draw the ten digits with the teacher in many steps, the teacher in one and the student in one.

    Args:
        teacher, student: bundled names or pipeline folders that make 32x32 digits.
        teacher_steps: of the teacher's slow row.
        images: that each row is scored on: a multiple of 10, at least 100. The project's figures are of 1000.
        timed: images that each row is timed on, one at a time, all rows in turn.
        seed: image i of every row starts from the noise of `seed + i`.
        train: "dmd" distils another student now, from the teacher, and adds it as a row.
        minutes: to distil for.
        device: as for `OneStepPipeline.from_pretrained`.
        command: what the page says it was made by.
        report: called as things get done.

    Raises:
        ValueError: a bad argument, a model that makes no 32x32 images; ModelError for one that is unknown or broken.
        ImportError: scikit-learn, which has the real digits, is not installed.
    """
    if images < SHOWN or images % 10:
        raise ValueError(f"images={images}: needed a multiple of 10, at least {SHOWN}")
    if timed < 1:
        raise ValueError(f"timed={timed}: needed 1 or more")
    if train is not None and train not in METHODS:
        raise ValueError(f"train={train!r}: unknown method; known: {', '.join(METHODS)}")
    if not 0 < minutes < float("inf"):
        raise ValueError(f"minutes={minutes}: needed a number above 0")
    load_originals()
    begin = time.perf_counter()

    slow, fast = (_load(name, device) for name in (teacher, student))
    entries = [
        ("Teacher", "as it was trained to draw", slow, teacher_steps),
        ("Teacher", "the same network, hurried", slow, 1),
    ]
    training = None
    if train is not None:
        pipe, training = distil_live(teacher, 60 * minutes, seed, slow.device, report)
        entries.append(("Distilled just now", _trained_for(training), pipe, 1))
    entries.append(("Student", "distilled from the teacher", fast, 1))

    milliseconds = _time([(pipe, steps) for *_, pipe, steps in entries], timed, report)
    rows = []
    for (name, note, pipe, steps), quantiles in zip(entries, milliseconds):
        what = f"{name}, {steps} step{'s' if steps > 1 else ''}: {images} images"
        made, labels = _draw(pipe, steps, images, seed, lambda done, what=what: report(what, done, images))
        rows.append(Row(name, note, steps, _ink(made[:SHOWN]), quantiles, score(made, labels)))
    return DemoResult(
        rows=tuple(rows),
        images=images,
        timed=timed,
        seed=seed,
        machine={**machine(), "device": _device_name(slow.device)},
        versions={name: version for name, version in collect_versions().items() if version},
        command=command,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        seconds=time.perf_counter() - begin,
        training=training,
    )


def _load(model: str | Path, device: str | None) -> OneStepPipeline:
    pipe = OneStepPipeline.from_pretrained(model, device=device)
    first = pipe(prompt(0), output="pt")
    if first.shape[1:] != (3, 32, 32):
        height, width = first.shape[2:]
        raise ValueError(f"{model} makes images of {width} x {height}; the demo needs digits of 32 x 32")
    return pipe


def _time(entries: list[tuple[OneStepPipeline, int]], timed: int, report: Report) -> list[tuple[float, float, float]]:
    """Per entry, the 20 %, 50 % and 80 % quantiles of milliseconds per image, PIL image included.

    The entries take turns, so that a machine that is busy for a while is busy for all of them.
    """
    for pipe, steps in entries:
        pipe.warmup(steps=steps)
    spent: list[list[float]] = [[] for _ in entries]
    for index in range(timed):
        report("timing", index, timed)
        for (pipe, steps), times in zip(entries, spent):
            start = time.perf_counter()
            pipe(prompt(index % 10), seed=index, steps=steps)
            times.append(1000 * (time.perf_counter() - start))
    report("timing", timed, timed)
    return [tuple(float(q) for q in np.quantile(times, (0.2, 0.5, 0.8))) for times in spent]


def _draw(
    pipe: OneStepPipeline, steps: int, images: int, seed: int, report: Callable[[float], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 3, 32, 32) in [-1, 1] on the CPU and the digits (n,) that were asked for: 0, 1, ..., 9, 0, 1, ..."""
    labels = balanced_labels(images // 10)
    made = []
    for start in range(0, images, BATCH):
        report(start)
        some = [prompt(int(label)) for label in labels[start : start + BATCH]]
        made.append(pipe(some, seed=seed + start, steps=steps, output="pt").float().cpu() * 2 - 1)
    report(images)
    return torch.cat(made), labels


def _ink(made: torch.Tensor) -> np.ndarray:
    return ((made.mean(dim=1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()


def _trained_for(training: Training) -> str:
    return f"{training.updates} updates in {training.seconds:.0f} s"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
