"""`python -m fastdistill.training METHOD …`, under torchrun too: distil a teacher into few steps."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from . import memory_report
from .checkpoint import CheckpointError
from .contract import GradientContractError
from .digits import digits_scores
from .documented import described, summary
from .images import TooManyUnreadable
from .interruption import sigterm_as_ctrl_c
from .memory_plan import MemoryPlan
from .plan import plan, render
from .registry import METHODS, config_class
from .run import (
    RUN_FILE,
    RunConfig,
    check_run,
    chosen_device,
    load_run,
    open_data,
    run_yaml,
    save_student,
    train,
    was_begun,
)
from .teacher import Teacher
from .world import World, world_of_environment

app = typer.Typer(
    add_completion=False,
    help="Distil a diffusion teacher into a student of one or a few steps.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)

FORESEEN = (
    ValueError,
    OSError,
    ImportError,
    FloatingPointError,
    CheckpointError,
    GradientContractError,
    TooManyUnreadable,
)


@app.callback()
def methods() -> None:
    """One command per method; `METHOD --help` lists its settings."""


class _MethodCommand(TyperCommand):
    """A command whose help ends with every setting of the method, read from its dataclasses."""

    def format_help(self, ctx, formatter) -> None:
        super().format_help(ctx, formatter)
        console.print(_settings_table(self.name))


def _settings_table(method: str) -> Table:
    kind = config_class(method)
    title = f"Settings of {method}: --set NAME=VALUE, or under method: in YAML. {summary(kind)}"
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("name", style="cyan", no_wrap=True)
    table.add_column("default", overflow="fold")
    table.add_column("meaning", ratio=1)
    for name, value, doc in [*described(kind()), *_of_the_run(method)]:
        table.add_row(Text(name), Text(value), Text(doc))
    return table


def _of_the_run(method: str) -> list[tuple[str, str, str]]:
    """The settings of a run that have no option of their own."""
    run = described(RunConfig(method=config_class(method)()))
    return [row for row in run if row[0].partition(".")[0] in ("images", "validation")]


def _command(method: str) -> Callable[..., None]:
    def command(
        config: Annotated[
            Path | None, typer.Option(metavar="FILE.yaml", help="The run: what --write-config writes, or a part of it.")
        ] = None,
        out: Annotated[
            Path | None, typer.Option(help="Pipeline folder to write; an existing pipeline there is replaced.")
        ] = None,
        teacher: Annotated[
            str | None, typer.Option(help="Bundled name or pipeline folder.", show_default="digits-teacher")
        ] = None,
        prompts: Annotated[
            str | None,
            typer.Option(
                help='Text file, one prompt a line, or "digits": all their captions.',
                show_default="digits",
            ),
        ] = None,
        images: Annotated[
            str | None,
            typer.Option(
                help='Real samples with captions: a folder, tar files, a dataset, or "digits".', show_default="none"
            ),
        ] = None,
        pairs: Annotated[
            Path | None, typer.Option(help="Folder of pairs made before.", show_default="made as needed")
        ] = None,
        seed: Annotated[int | None, typer.Option(help="Of everything random.", show_default="0")] = None,
        updates: Annotated[
            int | None, typer.Option(help="Updates of the student.", show_default="the method's")
        ] = None,
        roles: Annotated[
            str | None, typer.Option(help="full, or lora:RANK: adapters of one frozen base.", show_default="full")
        ] = None,
        optimizer: Annotated[
            str | None, typer.Option(help="Moments in float32 or 8bit.", show_default="by the student's size")
        ] = None,
        checkpointing: Annotated[
            str | None,
            typer.Option(help="none, recompute or blocks: less kept, more computed.", show_default="by the size"),
        ] = None,
        precision: Annotated[
            str | None, typer.Option(help="float32 or bfloat16 (autocast).", show_default="by the size")
        ] = None,
        device: Annotated[
            str | None, typer.Option(help="cpu, cuda, cuda:1 …", show_default="a GPU if there is one")
        ] = None,
        checkpoints: Annotated[
            Path | None,
            typer.Option(help="Folder for checkpoints. With it, SIGTERM and SIGINT save one and exit with 0."),
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest one in --checkpoints.")] = False,
        settings: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method (below), or a field of the run."),
        ] = None,
        watch: Annotated[
            Path | None, typer.Option(help="Folder for log, pictures, curves and a report of the run.")
        ] = None,
        export_dtype: Annotated[
            str | None, typer.Option(help="Of the student on disk: float16, bfloat16, float32.", show_default="float16")
        ] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="One update of every role, and the plan; nothing is written.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: JSON instead of tables.")] = False,
        write_config: Annotated[
            Path | None,
            typer.Option(metavar="FILE.yaml", help="Write the whole configuration with comments, and end."),
        ] = None,
    ) -> None:
        options = {
            "out": out,
            "teacher": teacher,
            "prompts": prompts,
            "images": images,
            "pairs": pairs,
            "seed": seed,
            "updates": updates,
            "roles": roles,
            "optimizer": optimizer,
            "checkpointing": checkpointing,
            "precision": precision,
            "device": device,
            "checkpoints": checkpoints,
            "watch": watch,
            "export_dtype": export_dtype,
        }
        with _one_line_errors():
            run = load_run(method, config, settings or [], **options)
            if as_json and not dry_run:
                raise ValueError("--json is for --dry-run")
            if write_config is not None:
                _write_config(run, write_config)
            elif dry_run:
                _dry_run(run, as_json)
            else:
                check_run(run, resume=resume)
                with world_of_environment(chosen_device(run.device)) as world:
                    _train(run, resume, world)

    entry = METHODS[method]
    command.__doc__ = f"{entry.title} ({', '.join(entry.papers)}).\n\n{entry.about}"
    return command


for _name in METHODS:
    app.command(_name, cls=_MethodCommand, no_args_is_help=True)(_command(_name))


def _write_config(run: RunConfig, file: Path) -> None:
    if file.exists():
        raise FileExistsError(f"--write-config {file}: exists; it is left as it is")
    file.write_text(run_yaml(run), encoding="utf-8")
    _say(f"{file}: fastdistill train {run.method.method} --config {shlex.quote(str(file))}")


def _dry_run(run: RunConfig, as_json: bool) -> None:
    prompts = check_run(run, writes=run.out is not None)
    teacher = Teacher(run.teacher, chosen_device(run.device))
    found = plan(teacher, prompts, run.method, images=open_data(run, teacher), pairs=run.pairs)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        console.print(render(found))


def _train(run: RunConfig, resume: bool, world: World) -> None:
    if run.checkpoints is None:
        _train_and_save(run, resume, world)
        return
    try:
        with sigterm_as_ctrl_c():
            _train_and_save(run, resume, world)
    except KeyboardInterrupt:  # outside of the loop, where there is nothing to save
        if world.is_first:
            _say(f"ended by a signal; {_how_to_go_on(run)}")


def _train_and_save(run: RunConfig, resume: bool, world: World) -> None:
    memory = _Memory(world)
    result = train(run, resume=resume, world=world, planned=memory.planned)
    if not world.is_first:
        return
    memory.measured(chosen_device(run.device))
    if result.run.ended.startswith("SIG"):
        _say(f"{result.run.ended} after {_counts(result.run.updates)}; {_how_to_go_on(run)}")
        return
    save_student(run, result)
    _say(f"{run.out}: {_counts(result.run.updates)} in {result.run.seconds:.0f} s")
    if run.is_of_digits:
        steps = result.facts["sampling"]["steps"]
        for noise_seed, scores in digits_scores(result.pipeline, steps=steps):
            _say(
                f"{'one step' if steps == 1 else f'{steps} steps'}, noise {noise_seed}: FD {scores.fd:.3f}, accuracy "
                f"{scores.accuracy:.3f}, diversity {scores.diversity:.2f} (lowest digit "
                f"{min(scores.diversity_per_digit):.2f})"
            )


class _Memory:
    """What is said of memory: before the run what it will take, afterwards what it took."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.plan: MemoryPlan | None = None

    def planned(self, plan: MemoryPlan | None, why_not: str) -> None:
        self.plan = plan
        if not self.world.is_first:
            return
        if plan is None:
            _say(f"No memory plan: {' '.join(why_not.split())}")
            return
        console.print(memory_report.short(plan), soft_wrap=True, highlight=False)
        if self.world.size > 1:
            _say(f"It is of one process that holds everything whole; {self.world.size} share the run.")

    def measured(self, device: torch.device) -> None:
        if self.plan is None:
            return
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        _say(memory_report.measured(self.plan, peak))


def _how_to_go_on(run: RunConfig) -> str:
    if not was_begun(run.checkpoints):
        return "the same command begins again"
    again = shlex.join(["--config", str(run.checkpoints / RUN_FILE), "--resume"])
    return f"go on with: fastdistill train {run.method.method} {again}"


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except FORESEEN as error:
        line = " ".join(str(error).split()) or type(error).__name__
        errors.print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def _counts(updates: dict[str, int]) -> str:
    return ", ".join(f"{count} of {role}" for role, count in updates.items())


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    app(prog_name="python -m fastdistill.training")
