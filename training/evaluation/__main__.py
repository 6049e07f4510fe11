"""`fastdistill evaluate MODEL`: figures of many images, made by one process, by torchrun's, or on a Ray cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastdistill.models import resolve_model

from .. import ray_options
from ..cluster import ClusterError
from ..run import chosen_device, read_prompts
from ..validation import ValidationConfig
from ..world import world_of_environment
from .figures import Report, evaluate, evaluate_on_ray

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
errors = Console(stderr=True)


@app.command()
def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Bundled name or pipeline folder.")],
    reference: Annotated[
        Path | None,
        typer.Option(help="Real images: a folder of pictures, or statistics of their features (.npz, .safetensors)."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="WHICH",
            show_default="the sliced Wasserstein distance of small pictures",
            help="package.module:function for their Frechet distance; torch-fidelity's weights, a .pth file, for FID.",
        ),
    ] = None,
    prompts: Annotated[str, typer.Option(help='Text file, one prompt a line, or "digits": every caption.')] = "digits",
    count: Annotated[int, typer.Option(min=2, help="Images.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps; a distilled student needs 1.")] = 1,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; up to 1 it is off.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images made at once.")] = 50,
    size: Annotated[int, typer.Option(min=1, help="Of the small pictures, pixels along each side.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
    ray: ray_options.Ray = False,
    ray_address: ray_options.Address = None,
    ray_workers: ray_options.Workers = None,
    ray_cpus: ray_options.Cpus = None,
    ray_gpus: ray_options.Gpus = None,
    ray_retries: ray_options.Retries = None,
) -> None:
    """Print the figures of a model: without --reference those of the digits, else how far from it the images are.

    Under torchrun its processes share the work. The figures are the same, however many there are.
    """
    with _one_line_errors():
        options = {"address": ray_address, "workers": ray_workers, "cpus": ray_cpus, "gpus": ray_gpus}
        cluster = ray_options.cluster_of(ray, device, retries=ray_retries, **options)
        if reference is None and features is not None:
            raise ValueError(f"--features {features}: needed --reference too")
        config = ValidationConfig(
            "digits" if reference is None else "reference",
            count=count,
            seed=seed,
            batch_size=batch_size,
            reference=None if reference is None else str(reference),
            features=features,
            size=size,
        )
        lines = read_prompts(prompts)
        resolve_model(model)
        how = {"steps": steps, "guidance_scale": max(guidance_scale, 1.0)}
        with _progress(count) as report:
            if cluster is not None:
                figures = evaluate_on_ray(model, lines, config, cluster=cluster, device=device, report=report, **how)
            else:
                rank = os.environ.get("LOCAL_RANK")
                own = chosen_device(f"cuda:{rank}" if device == "cuda" and rank is not None else device)
                with world_of_environment("cpu") as world:  # features are sent, from host to host
                    figures = evaluate(model, lines, config, device=own, world=world, report=report, **how)
    if figures is None:
        return
    if as_json:
        print(json.dumps({"model": model, "count": count, "seed": seed, **how, "figures": figures}, indent=2))
    else:
        for name, value in figures.items():
            print(f"{name.replace('_', ' '):20}{value:.4f}")


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, ImportError, ClusterError, torch.OutOfMemoryError) as error:
        errors.print(
            f"error: {' '.join(str(error).split())}",
            style="red",
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(2) from error


@contextmanager
def _progress(count: int) -> Iterator[Report]:
    """A bar where there is a terminal; of several processes the first one's."""
    shown = errors.is_terminal and int(os.environ.get("RANK", "0")) == 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("images"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=errors, disable=not shown) as bar:
        task = bar.add_task("making", total=count)
        yield lambda done, total: bar.update(task, completed=done)


if __name__ == "__main__":
    app(prog_name="fastdistill evaluate")
