"""One update of each training method at its real size, with random weights: `python -m fastdistill.bench.real_size`.

Time and peak memory on a GPU; nothing is compared, and nothing is learned. What a method allocates and computes does
not depend on its weights, so none need to be downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from fastdistill.training import ADDConfig, LatentData, MethodConfig, Setup, Stage, Teacher, TrainerConfig
from rich.console import Console
from rich.table import Table

from fastdistill.models import ARCHITECTURES, build
from fastdistill.models.loading import quiet_libraries

from . import environment
from .plain_training import Clock, TrainerUpdate
from .report import print_wide
from .training import CASES

PROMPTS = ("a photograph of a lighthouse", "an oil painting of a fox")


# Of ADD's features: ViT-S/16 at 224 pixels is DINO's, which StyleGAN-T and ADD-M judge with.
VIT_S = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}


@dataclass(frozen=True)
class Figures:
    """Of a method's update: one turn of every role, optimisers and the student's average included.

    Attributes:
        parameters: of each role, those that train and those that do not.
        seconds, turns: of an update and of each of its turns, medians over `updates`.
        peak_bytes: allocated on the GPU at most at one time, networks and optimiser states included; None on a CPU.
        losses: of the last update.
    """

    method: str
    architecture: str
    resolution: int
    batch: int
    precision: str
    updates: int
    parameters: dict[str, int]
    seconds: float
    turns: dict[str, float]
    peak_bytes: int | None
    losses: dict[str, float]

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.losses.values()))


@contextmanager
def saved_vit(vit: dict[str, object]) -> Iterator[Path]:
    """A folder with a vision transformer of random weights, as `build_features` opens one."""
    from transformers import ViTConfig, ViTModel

    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        ViTModel(ViTConfig(**vit), add_pooling_layer=False).save_pretrained(folder)
        statistics_of = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        Path(folder, "preprocessor_config.json").write_text(json.dumps(statistics_of))
        yield Path(folder)


def stage_of(method: str, teacher: Teacher, batch: int, precision: str, features: Path | None) -> Stage:
    """The method's first stage on random images of the teacher's own size."""
    config: MethodConfig = CASES[method].config
    config = replace(config, trainer=replace(config.trainer, batch_size=batch, precision=precision))
    if isinstance(config, ADDConfig):
        config = replace(config, features=str(features))
    channels, height, width = teacher.sample_shape
    factor, device = teacher.pipeline.vae_scale_factor, teacher.device
    images = torch.rand(batch, 3, factor * height, factor * width, device=device) * 2 - 1
    conditions = teacher.encode(PROMPTS)
    captions = torch.arange(batch, device=device)[:, None] % len(PROMPTS)
    latents = torch.randn(batch, channels, height, width, device=device)
    data = LatentData(latents, conditions, captions, images=images)
    return next(config.stages(Setup(teacher, PROMPTS, conditions, data)))


def measure(
    method: str,
    architecture: str = "sd15",
    *,
    vit: dict[str, object] = VIT_S,
    batch: int = 2,
    precision: str = "bfloat16",
    updates: int = 3,
    device: str = "cuda",
) -> Figures:
    """Figures of `updates` updates after one, which allocates what stays.

    Args:
        method: of `fastdistill.bench.training.CASES`.
        architecture: of `fastdistill.models.ARCHITECTURES`.
        vit: arguments of the `ViTConfig` of ADD's features.
    """
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    torch.manual_seed(0)
    teacher = Teacher(build(architecture, device=device))
    with saved_vit(vit) as features:
        stage = stage_of(method, teacher, batch, precision, features)
    clock = Clock(wait)
    update = TrainerUpdate(stage, clock)
    update()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    for _ in range(updates):
        losses = update()
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    taken = {role: [ns / 1e9 for ns in each[-updates:]] for role, each in clock.turns.items()}
    return Figures(
        method=method,
        architecture=architecture,
        resolution=teacher.sample_shape[1] * teacher.pipeline.vae_scale_factor,
        batch=batch,
        precision=precision,
        updates=updates,
        parameters={role: sum(p.numel() for p in network.parameters()) for role, network in stage.method.roles.items()},
        seconds=statistics.median(map(sum, zip(*taken.values()))),
        turns={role: statistics.median(each) for role, each in taken.items()},
        peak_bytes=peak,
        losses={name: float(value) for name, value in losses.items()},
    )


def report(found: Sequence[Figures]) -> Table:
    """A line per method."""
    table = Table(title="an update, random weights")
    for heading in ("method", "architecture", "size", "batch", "precision", "s/update", "share of turns", "peak GiB"):
        table.add_column(heading, no_wrap=True)
    for each in found:
        shares = ", ".join(f"{role} {100 * part / each.seconds:.0f} %" for role, part in each.turns.items())
        peak = "-" if each.peak_bytes is None else f"{each.peak_bytes / 2**30:.1f}"
        cells = (each.method, each.architecture, f"{each.resolution} px", str(each.batch), each.precision)
        table.add_row(*cells, f"{each.seconds:.3f}", shares, peak)
    return table


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def real_size(
    methods: Annotated[
        list[str] | None, typer.Argument(metavar="METHOD...", help=f"{', '.join(CASES)}  [default: all]")
    ] = None,
    architecture: Annotated[str, typer.Option(help=f"of {', '.join(ARCHITECTURES)}")] = "sd15",
    batch: Annotated[int, typer.Option(min=1, help="samples per update")] = 2,
    precision: Annotated[str, typer.Option(help="bfloat16 or float32; weights are float32")] = "bfloat16",
    updates: Annotated[int, typer.Option(min=1, help="measured, after one that is not")] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures and the machine")] = None,
) -> None:
    """Time and peak memory of an update of each method on a GPU.

    Exit code 1 if a loss is not finite, 2 for bad input.
    """
    unknown = [name for name in methods or () if name not in CASES]
    if unknown or architecture not in ARCHITECTURES:
        name, known = (unknown[0], CASES) if unknown else (architecture, ARCHITECTURES)
        _refuse(f"{name!r} is unknown; known: {', '.join(known)}")
    try:
        TrainerConfig(precision=precision)
    except ValueError as error:
        _refuse(str(error))
    if not torch.cuda.is_available():
        _refuse("needs an NVIDIA GPU, and torch sees none")
    found = []
    for method in methods or CASES:
        found.append(measure(method, architecture, batch=batch, precision=precision, updates=updates))
        torch.cuda.empty_cache()  # another method's networks come next
        if out is not None:
            _write(out, found)
    print_wide(Console(), report(found))
    if not all(each.finite for each in found):
        raise typer.Exit(1)


def _refuse(reason: str) -> None:
    typer.echo(f"error: {reason}", err=True)
    raise typer.Exit(2)


def _write(out: Path, found: Sequence[Figures]) -> None:
    content = {"environment": environment.describe("cuda"), "updates": [dataclasses.asdict(each) for each in found]}
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, out)


if __name__ == "__main__":
    app(prog_name="python -m fastdistill.bench.real_size")
