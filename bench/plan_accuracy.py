"""The memory plan of the digits runs against torch's profiler: `python -m fastdistill.bench.plan_accuracy`.

The profiler sees every allocation of torch's CPU allocator, kernels' own buffers too; the plan knows shapes alone.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from fastdistill.training import LatentData, MethodConfig, Setup, Teacher, Trainer, plan_memory
from fastdistill.training.digits import digits_prompts
from fastdistill.training.memory_report import size
from fastdistill.training.registry import METHODS, config_class
from fastdistill.training.settings import changed
from rich.console import Console
from rich.table import Table

MODEL = "digits-teacher"
_SAMPLES = 64  # pairs and real digits: what the data takes is no matter of this
_STEADY = "fastdistill steady state"


@dataclass(frozen=True)
class Compared:
    """The highest point of an iteration in which all turns are due: bytes of tensors, weights and states included."""

    method: str
    batch: int
    planned_bytes: int
    measured_bytes: int

    @property
    def ratio(self) -> float:
        return self.planned_bytes / self.measured_bytes


def compare(method: str, batch: int | None = None) -> Compared:
    """The first stage of a method's run on the digits, as `fastdistill train` makes it.

    batch: samples; None is the method's own.
    """
    config = _first_stage(config_class(method)(), batch)
    teacher = Teacher(MODEL)
    plan = plan_memory(config, teacher, prompts=len(digits_prompts()), images=_images(teacher), device="cpu")
    planned = max(turn.peak_bytes for turn in plan.stages[0].turns if turn.turn != "preparation")
    del teacher
    return Compared(method, config.trainer.batch_size, planned, _measured(config))


def _first_stage(config: MethodConfig, batch: int | None) -> MethodConfig:
    """Without what an iteration does not need."""
    if batch is not None:
        config = changed(config, trainer={"batch_size": batch})
    if hasattr(config, "pair_steps"):
        config = replace(config, pair_steps=1, pairs=_SAMPLES)
    if hasattr(config, "straightness_samples"):
        config = replace(config, straightness_samples=0)
    return config


def _measured(config: MethodConfig) -> int:
    # torch's profiler writes two lines of its own to stderr per use; read when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:  # from the beginning on: it knows the size of what it saw being made
        trainer, setup = _trainer(config)
        _iterate(trainer)  # which makes what stays
        with torch.profiler.record_function(_STEADY):
            _iterate(trainer)
    del setup  # until now, as in a run
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return _peak(json.loads(path.read_text())["traceEvents"])


def _iterate(trainer: Trainer) -> None:
    """In which all turns are due."""
    trainer.iteration = math.lcm(*(turn.every for turn in trainer.method.turns)) - 1
    trainer.iterate()


def _trainer(config: MethodConfig) -> tuple[Trainer, Setup]:
    teacher, prompts = Teacher(MODEL), digits_prompts()
    for network in teacher.networks():
        for t in (*network.parameters(), *network.buffers()):
            t.data = t.data.clone()  # a file that is mapped into memory is no allocation
    setup = Setup(teacher, tuple(prompts), teacher.encode(prompts), _images(teacher))
    stage = next(config.stages(setup))
    return Trainer(stage.method, stage.data, stage.trainer, stage.roles, stage=stage.name), setup


def _images(teacher: Teacher) -> LatentData:
    """Noise in place of digits: their values are no matter either."""
    side, conditions = 8 * teacher.sample_shape[1], teacher.encode(digits_prompts())
    captions = torch.arange(_SAMPLES)[:, None] % len(conditions)
    latents, images = torch.randn(_SAMPLES, *teacher.sample_shape), torch.rand(_SAMPLES, 3, side, side) * 2 - 1
    return LatentData(latents, conditions, captions, images=images)


def _peak(events: Sequence[dict]) -> int:
    """The most that was allocated at a time within the steady state."""
    (steady,) = (e for e in events if e["name"] == _STEADY and e.get("cat") == "user_annotation")
    changes = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == 0]
    total = highest = 0
    for event in sorted(changes, key=lambda e: (e["ts"], e["args"].get("Ev Idx", 0))):
        total += event["args"]["Bytes"]
        if steady["ts"] <= event["ts"] <= steady["ts"] + steady["dur"]:
            highest = max(highest, total)
    return highest


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def plan_accuracy(
    methods: Annotated[
        list[str] | None, typer.Argument(metavar="METHOD...", help=f"{', '.join(METHODS)}  [default: all]")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="samples  [default: each method's own]")] = None,
) -> None:
    """The planned peak of an iteration on the digits, and the one that torch's profiler measures.

    Exit code 1 if a plan is more than 10 % off.
    """
    unknown = [name for name in methods or () if name not in METHODS]
    if unknown:
        typer.echo(f"error: {unknown[0]!r} is unknown; known: {', '.join(METHODS)}", err=True)
        raise typer.Exit(2)
    table = Table(title="peak of tensors in an iteration on the digits, all turns due")
    for heading in ("method", "batch", "planned", "profiler", "planned / profiler"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    found = [compare(method, batch) for method in methods or METHODS]
    for each in found:
        sizes = size(each.planned_bytes), size(each.measured_bytes)
        table.add_row(each.method, str(each.batch), *sizes, f"{each.ratio:.3f}")
    Console().print(table)
    if any(abs(each.ratio - 1) > 0.1 for each in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m fastdistill.bench.plan_accuracy")
