"""`python -m fastdistill.training dmd …`: distil a teacher into one step from the command line."""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastdistill.models import ModelError, resolve_model

from .checkpoint import CheckpointError
from .digits import digits_card, digits_prompts, digits_scores
from .distill import distill
from .dmd import DMDConfig
from .pipelines import TeacherError, check_output_folder
from .trainer import TrainingProgress

app = typer.Typer(add_completion=False, help="Distil diffusion teachers into one-step students.", no_args_is_help=True)
console = Console()
errors = Console(stderr=True)


@app.callback()
def methods() -> None:
    """One command per method."""


@app.command()
def dmd(
    out: Annotated[Path, typer.Option(help="Pipeline folder to write; an existing pipeline there is replaced.")],
    teacher: Annotated[str, typer.Option(help="Bundled name or pipeline folder.")] = "digits-teacher",
    prompts: Annotated[
        str, typer.Option(help='Text file, one prompt a line, or "digits": every caption of the ten digits.')
    ] = "digits",
    iterations: Annotated[int, typer.Option(help="Updates of the student.")] = DMDConfig.iterations,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints. With it, SIGTERM and SIGINT save one and exit with 0.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the newest checkpoint in --checkpoints.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other field of DMDConfig, for example critic_ratio=10."),
    ] = None,
) -> None:
    """Distribution matching distillation: a student that needs one step, without any training images."""
    try:
        config = _config(settings or [], iterations=iterations, seed=seed)
        lines = _prompts(prompts)
        check_output_folder(out)
        resolve_model(teacher)
        _check_device(device)
        with _progress_bar() as bar:
            task = bar.add_task("preparing pairs", total=config.iterations)
            result = distill(
                teacher,
                lines,
                config,
                device=device,
                callback=lambda p: _show(bar, task, p),
                checkpoints=checkpoints,
                resume=resume,
            )
        if result.run.ended.startswith("SIG"):
            console.print(
                f"{result.run.ended} after update {result.run.updates['student']} of {config.iterations}; "
                f"continue with --checkpoints {checkpoints} --resume",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            return
        result.save(out, card=digits_card(out.name, config) if prompts == "digits" else None)
    except (CheckpointError, ModelError, TeacherError, ValueError, OSError, FloatingPointError) as error:
        errors.print(
            f"error: {' '.join(str(error).split())}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(2) from error
    updates = ", ".join(f"{count} of {role}" for role, count in result.run.updates.items())
    console.print(f"{out}: {updates} in {result.run.seconds:.0f} s", highlight=False, markup=False, soft_wrap=True)
    if prompts == "digits":
        for noise_seed, scores in digits_scores(result.pipeline):
            console.print(
                f"one step, noise {noise_seed}: FD {scores.fd:.3f}, accuracy {scores.accuracy:.3f}, diversity "
                f"{scores.diversity:.2f} (lowest digit {min(scores.diversity_per_digit):.2f})",
                highlight=False,
            )


def _config(settings: list[str], **given) -> DMDConfig:
    types = typing.get_type_hints(DMDConfig)
    for setting in settings:
        name, equals, value = setting.partition("=")
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(types)}"
            raise ValueError(f"--set {setting}: unknown setting {name!r}{hint}")
        wanted = int if types[name] == (int | None) else types[name]
        try:
            given[name] = wanted(value)
        except ValueError:
            raise ValueError(f"--set {setting}: needed {name}=<{wanted.__name__}>") from None
        if not equals:
            raise ValueError(f"--set {setting}: needed {name}=<{wanted.__name__}>")
    return DMDConfig(**given)


def _prompts(source: str) -> list[str]:
    if source == "digits":
        return digits_prompts()
    path = Path(source)
    if not path.is_file():
        raise ValueError(f'--prompts {source}: no such file; needed a text file with one prompt a line, or "digits"')
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise ValueError(f"--prompts {source}: no prompt in this file")
    return [line for line in lines if line]


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: needed cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch sees no NVIDIA GPU")


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
    )


def _show(bar: Progress, task, progress: TrainingProgress) -> None:
    shown = " ".join(f"{name} {value:.3f}" for name, value in progress.losses.items() if name != "guarded")
    bar.update(task, completed=progress.update, description=shown)


if __name__ == "__main__":
    app(prog_name="python -m fastdistill.training")
