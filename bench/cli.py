"""The command line of the benchmarks: reads and checks the options, runs, prints, writes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastdistill.ops import BackendError

from . import benchmark, environment
from .modes import MODES
from .report import print_report
from .rows import Row, write_jsonl
from .runner import CACHES, DEVICES, DTYPES, Selection, run

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

EXIT_FAILED, EXIT_USAGE = 1, 2
ALL = "all"


class _UsageError(Exception):
    """One line for the user."""


@app.command()
def bench(
    ops: Annotated[list[str], typer.Argument(metavar="OP...", help=f"{', '.join(benchmark.OPS)}, or all")],
    mode: Annotated[str, typer.Option(help=f"of {', '.join(MODES)}")] = "forward",
    dtype: Annotated[str, typer.Option(help=f"of {', '.join(DTYPES)}")] = "float32,bfloat16",
    layout: Annotated[str, typer.Option(help="of the op's layouts: contiguous, channels_last; or all")] = ALL,
    shapes: Annotated[str, typer.Option(help="suites (unet, sd15, sdxl, vae) or shapes (1280x8x8); or all")] = ALL,
    providers: Annotated[
        str | None,
        typer.Option(help="backends, torch, torch.compile; or all  [default: the op's kernels]"),
    ] = None,
    cache: Annotated[str, typer.Option(help="hot: inputs as they are left; cold: rotated through memory")] = "hot",
    device: Annotated[str, typer.Option(help=f"of {', '.join(DEVICES)}")] = "cpu",
    pairs: Annotated[int, typer.Option(min=1, help="interleaved samples per row")] = 30,
    threads: Annotated[int | None, typer.Option(min=1, help="[default: torch's choice]")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for results.jsonl")] = None,
) -> None:
    """Time ops against what a user would otherwise call, with the error of each.

    Options take lists separated by commas. Exit code: 0; 1 if an error exceeds its limit or nothing could be measured;
    2 for bad options.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    described = environment.describe()
    try:
        selections = [
            _select(op, mode, dtype, layout, shapes, providers, cache, device, pairs)
            for op in (benchmark.OPS if ALL in ops else dict.fromkeys(ops))
        ]
        if out is not None:
            _check_writable(out)
        rows = _run(selections)
    except (_UsageError, benchmark.UnknownName, BackendError) as error:  # the last from FASTDISTILL_BACKEND
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_USAGE) from None
    print_report(rows, described, Console())
    if out is not None:
        typer.echo(f"{len(rows)} rows written to {write_jsonl(rows, described, out)}")
    statuses = {row.status for row in rows}
    if statuses == {"missing"}:
        typer.echo("error: nothing was measured; the reasons stand above", err=True)
    if "failed" in statuses or statuses == {"missing"}:
        raise typer.Exit(EXIT_FAILED)


def _select(
    op: str,
    mode: str,
    dtype: str,
    layout: str,
    shapes: str,
    providers: str | None,
    cache: str,
    device: str,
    pairs: int,
) -> Selection:
    chosen = benchmark.load(op)
    return Selection(
        chosen,
        cases=chosen.select_cases(None if shapes == ALL else _split("--shapes", shapes)),
        providers=chosen.select_providers(None if providers is None else _split("--providers", providers)),
        modes=_choices("--mode", mode, tuple(MODES)),
        dtypes=_choices("--dtype", dtype, tuple(DTYPES)),
        layouts=_choices("--layout", layout, chosen.layouts),
        caches=_choices("--cache", cache, CACHES),
        device=_device(device),
        pairs=pairs,
    )


def _split(option: str, value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    if not names:
        raise _UsageError(f"{option}: got an empty list")
    return names


def _choices(option: str, value: str, known: Sequence[str]) -> tuple[str, ...]:
    names = _split(option, value)
    if ALL in names:
        return tuple(known)
    for name in names:
        if name not in known:
            raise _UsageError(f"{option}: unknown {name!r}; known: {', '.join((*known, ALL))}")
    return names


def _device(device: str) -> str:
    if device not in DEVICES:
        raise _UsageError(f"--device: cannot time on {device!r}; known: {', '.join(DEVICES)}")
    return device


def _check_writable(directory: Path) -> None:
    """Before minutes of measuring, not after."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise _UsageError(f"--out: cannot write to {directory}: {error.strerror}") from error


def _run(selections: Sequence[Selection]) -> list[Row]:
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Console(stderr=True)
    with Progress(*columns, console=progress, transient=True, disable=not progress.is_terminal) as bar:
        for selection in selections:
            task = bar.add_task(selection.benchmark.op, total=len(selection))
            for row in run(selection):
                rows.append(row)
                bar.update(
                    task, advance=1, description=f"{row.key.mode} {row.key.dtype} {row.key.layout} {row.key.case}"
                )
    return rows
