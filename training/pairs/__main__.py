"""`fastdistill pairs generate|inspect|verify`: sets of pairs from the command line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastdistill import _output
from fastdistill.models import resolve_model

from .. import ray_options
from ..cluster import ClusterError
from ..run import chosen_device, read_prompts
from ..solvers import SOLVERS, check_solver
from ..teacher import Teacher
from . import generation, inspection, verification
from .pair_set import read_set
from .ray_job import generate_on_ray
from .source import Source

DTYPES = ("float32", "bfloat16", "float16")
LOG_SECONDS = 30  # between two lines where there is no terminal for a bar

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sets of pairs (noise, and where a teacher's ODE carries it) on disk.",
)
console = Console()
errors = Console(stderr=True)


@app.command()
def generate(
    out: Annotated[Path, typer.Option(help="Folder of the set: new, empty, or of this very set, to go on with it.")],
    count: Annotated[int, typer.Option(min=1, help="Pairs.")],
    teacher: Annotated[str, typer.Option(help="Bundled name or pipeline folder.")] = "digits-teacher",
    prompts: Annotated[
        str, typer.Option(help='Text file, one prompt a line, or "digits": every caption of the ten digits.')
    ] = "digits",
    solver: Annotated[str, typer.Option(help=f"{', '.join(SOLVERS)}. heun asks the teacher twice a step.")] = "dpmpp",
    steps: Annotated[int, typer.Option(min=1, help="Of the solver.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; up to 1 it is off.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of noises and prompts.")] = 0,
    noise: Annotated[str, typer.Option(help='"stored", or "seed": half the size, drawn again when read.')] = "stored",
    text: Annotated[bool, typer.Option("--text", help="Store the text embedding of each pair too.")] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="Pairs of a file.")] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs solved at once.")] = 16,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help='Make the I-th of N parts only, or "rank": torchrun\'s. Processes that share a folder need not.',
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"The teacher computes in: {', '.join(DTYPES)}.")] = "float32",
    ray: ray_options.Ray = False,
    ray_address: ray_options.Address = None,
    ray_workers: ray_options.Workers = None,
    ray_cpus: ray_options.Cpus = None,
    ray_gpus: ray_options.Gpus = None,
    ray_retries: ray_options.Retries = None,
) -> None:
    """Make a set, or go on with one. Any number of processes may do so at once; SIGTERM ends one after its shard.

    Under torchrun its processes share the work. With --ray the workers of a cluster do.
    """
    with _one_line_errors():
        part = _part(shard)
        options = {"address": ray_address, "workers": ray_workers, "cpus": ray_cpus, "gpus": ray_gpus}
        cluster = ray_options.cluster_of(ray, device, retries=ray_retries, **options)
        if ray and shard is not None:
            raise ValueError(f"--shard {shard}: needed none with --ray, which shares the shards out itself")
        lines = read_prompts(prompts)
        check_solver(solver)
        _choice("--noise", noise, ("stored", "seed"))
        _choice("--dtype", dtype, DTYPES)
        _output.check_folder(out)
        resolve_model(teacher)
        # A job's own process describes the set and computes nothing.
        source = Source.of(Teacher(teacher, "cpu" if ray else _device(device)), lines, getattr(torch, dtype))
        pair_set = source.pair_set(
            count=count,
            solver=solver,
            steps=steps,
            guidance_scale=max(guidance_scale, 1.0),
            seed=seed,
            shard_size=shard_size,
            noise=noise,
            text=text,
        )
        quiet = int(os.environ.get("RANK", "0")) > 0
        with _reporter(quiet) as report:
            if cluster is not None:
                del source
                options = {"device": device, "batch_size": batch_size, "report": report}
                result = generate_on_ray(teacher, lines, pair_set, out, cluster=cluster, **options)
            else:
                result = generation.generate(source, pair_set, out, batch_size=batch_size, part=part, report=report)
    if quiet and shard is None:
        return
    of_part = "" if part[1] == 1 else f" of part {part[0] + 1}/{part[1]}"
    if result.ended != "finished":
        _say(f"{result.ended} after {result.done} of {result.total} pairs{of_part}; the same command goes on with them")
        return
    again = f"; shards begun again because a worker was lost: {result.again}" if result.again else ""
    _say(f"{out}: {result.total} pairs{of_part}, {result.made} of them made here in {result.seconds:.0f} s{again}")


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Of the set.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what a set is made of, and which of its shards are there."""
    with _one_line_errors():
        contents = inspection.inspect(folder)
    if as_json:
        print(json.dumps(contents.as_dict(), indent=2))
    else:
        console.print(inspection.render(contents))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Of the set.")],
    teacher: Annotated[
        str | None, typer.Option(help="Bundled name or pipeline folder: some pairs are solved again and compared.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many pairs --teacher solves again.")] = 4,
    device: Annotated[str, typer.Option(help="For --teacher: cpu, cuda, cuda:1 …")] = "cpu",
) -> None:
    """Open every shard of a set; exit code 1 and a line for each problem, by file name."""
    with _one_line_errors():
        pair_set = read_set(folder)
        if teacher is not None:
            resolve_model(teacher)
        judge = None if teacher is None else Teacher(teacher, _device(device))
        with _bar("shards", TextColumn("")) as bar:
            task = bar.add_task("verifying", total=pair_set.shards)
            problems = verification.verify(
                folder, teacher=judge, samples=samples, report=lambda done, total: bar.update(task, completed=done)
            )
    for problem in problems:
        _say(f"{problem.file}: {problem.what}")
    if problems:
        raise typer.Exit(1)
    again = "" if teacher is None else f", {min(samples, pair_set.count)} of them solved again by {teacher}"
    _say(f"{folder}: {pair_set.count} pairs in {pair_set.shards} shards, whole and as they were written{again}")


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError, ClusterError, torch.OutOfMemoryError) as error:
        errors.print(
            f"error: {' '.join(str(error).split())}",
            style="red",
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(2) from error


def _part(shard: str | None) -> tuple[int, int]:
    """(i, n) of --shard; without it the whole, of which processes take what no other has taken."""
    if shard is None:
        return 0, 1
    if shard == "rank":
        try:
            return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        except KeyError as error:
            raise ValueError(
                f"--shard rank: there is no {error.args[0]}; needed a process that torchrun started"
            ) from error
    index, _, parts = shard.partition("/")
    if not (index.isdecimal() and parts.isdecimal() and 1 <= int(index) <= int(parts)):
        raise ValueError(f"--shard {shard}: needed I/N, for example 1/3, 2/3 and 3/3, or rank")
    return int(index) - 1, int(parts)


def _device(name: str) -> torch.device:
    """Under torchrun "cuda" is each process's own GPU."""
    return chosen_device(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name)


def _choice(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option} {value}: needed one of {', '.join(known)}")


@contextmanager
def _reporter(quiet: bool) -> Iterator[Callable[[generation.Progress], None]]:
    """A bar where there is a terminal, now and then a line where there is none; `quiet` neither."""
    if quiet:
        yield lambda progress: None
        return
    with _bar("pairs", TextColumn("{task.fields[rate]} pairs/s")) as bar:
        task = None
        before, said = 0, time.monotonic()

        def report(progress: generation.Progress) -> None:
            nonlocal task, before, said
            if task is None:
                before = progress.done
                task = bar.add_task("making", total=progress.total, completed=before, rate="-")
            # Of all processes: what is on the disk counts, whoever made it.
            rate = (progress.done - before) / max(progress.seconds, 1e-9)
            bar.update(task, completed=progress.done, rate=f"{rate:.1f}")
            if not errors.is_terminal and rate > 0 and time.monotonic() - said >= LOG_SECONDS:
                said = time.monotonic()
                left = (progress.total - progress.done) / rate
                _say(f"{progress.done} of {progress.total} pairs, {rate:.1f} pairs/s, {left:.0f} s left", errors)

        yield report


def _bar(what: str, extra: TextColumn) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(what), extra)
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    # In a log file every redraw would be a line of its own.
    return Progress(*columns, *times, console=errors, disable=not errors.is_terminal)


def _say(text: str, where: Console | None = None) -> None:
    (where or console).print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    app(prog_name="fastdistill pairs")
