"""A student distilled while one watches, in a time given rather than in a number of updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fastdistill import OneStepPipeline
from fastdistill.models.digits.text import prompt
from fastdistill.training import DMDConfig, TrainingProgress, distill
from fastdistill.training.settings import changed

from .result import Training

METHODS = ("dmd",)

# The learning rate stays constant, because how many updates fit into the time is not known before: the moving average
# does what its decay would do. Small batches and few critic updates: many updates matter more in so short a run.
_OPTIMIZER = {"decay": 0.0, "warm_up": 10}
LIVE = changed(
    DMDConfig(critic_ratio=2, pairs=300, pair_steps=10),
    trainer={"updates": 10**9, "batch_size": 32, "report_every": 1},
    student=_OPTIMIZER,
    fake_score=_OPTIMIZER,
)


def distil_live(
    teacher: str | Path,
    seconds: float,
    seed: int,
    device: torch.device,
    report: Callable[[str, float, float], None],
) -> tuple[OneStepPipeline, Training]:
    """Distil `teacher` by DMD for `seconds`, counted from the first update: a busy machine, slow to solve the teacher's
    ODE before it, must not eat up the time to learn.

    Args:
        teacher: a bundled name or a folder of a digits pipeline.
        seconds: one update is made at least.
        seed: of everything random. How many updates fit into the time depends on the machine, and so does the student.
        device: to train on.
        report: called with what is being done, the seconds that are over, and `seconds`.

    Returns:
        The student, ready to draw in one step, and what was done.
    """
    report("distilling: the teacher solves its ODE", 0, seconds)

    def progress(state: TrainingProgress) -> bool:
        report(f"distilling: update {state.update} of the student", min(state.seconds, seconds), seconds)
        return state.seconds >= seconds

    prompts = [prompt(digit) for digit in range(10)]
    result = distill(teacher, prompts, changed(LIVE, trainer={"seed": seed}), callback=progress, device=device)
    student = OneStepPipeline(result.pipeline, device=device, name="distilled just now")
    return student, Training("DMD", result.run.updates["student"], result.run.seconds)
