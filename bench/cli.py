"""The command line of the benchmarks: reads and checks the options, runs, prints, writes."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from fastdistill.ops import BackendError

from . import benchmark, changes, devices, environment, errors, execution, rows
from .modes import MODES
from .predict import print_predictions
from .report import print_report
from .runner import CACHES, DEVICES, DTYPES, PAIRS, Job, Selection

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

EXIT_FAILED, EXIT_USAGE = 1, 2
ALL = "all"
WHOLE = ("engine", "training")  # measured as a whole, not op by op


class _UsageError(Exception):
    """One line for the user."""


@app.command()
def bench(
    ops: Annotated[
        list[str] | None,
        typer.Argument(metavar="OP...", help=f"{', '.join((*benchmark.OPS, *WHOLE))}, or all", show_default=False),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help=f"of {', '.join(MODES)}  [default: forward, with --accuracy full]")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"of {', '.join(DTYPES)}")] = "float32,bfloat16",
    layout: Annotated[str, typer.Option(help="of the op's layouts: contiguous, channels_last; or all")] = ALL,
    shapes: Annotated[str, typer.Option(help="suites (unet, sd15, sdxl, vae) or shapes (1280x8x8); or all")] = ALL,
    providers: Annotated[
        str | None,
        typer.Option(help="backends, torch, torch.compile, peers; or all  [default: the op's kernels]"),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="hot: inputs as they are left; cold: rotated through memory; eager (GPU): calls without a graph  "
            "[default: hot on a CPU, all on a GPU]"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help=f"of {', '.join(DEVICES)}")] = "cpu",
    device_spec: Annotated[
        str | None,
        typer.Option(help=f"predict for a device instead of measuring: {', '.join(devices.KNOWN)}, or a JSON file"),
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(min=1, help="interleaved samples per row  [default: 30 on a CPU, 100 on a GPU]")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="[default: torch's choice]")] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, help="seconds; the most important rows first, what does not fit is left out")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for results.jsonl (merged) and plots")] = None,
    baseline: Annotated[Path | None, typer.Option(help="compare with this results.jsonl")] = None,
    threshold: Annotated[float, typer.Option(min=0, help="of --baseline: slower by more than this is a failure")] = 0.1,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="errors of every backend and result alone, nothing is timed")
    ] = False,
    profile: Annotated[Path | None, typer.Option(help="folder for a trace; nothing is timed")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the rows instead of measuring them")] = False,
) -> None:
    """Time ops against what a user would otherwise call, with the error of each.

    Options take lists separated by commas. Exit code: 0; 1 if an error exceeds its limit, a provider raises, nothing
    could be measured or --baseline was faster; 2 for bad options.
    """
    started = time.monotonic()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        names = _names(ops, device_spec)
        chosen = [benchmark.load(name) for name in names if name not in WHOLE]
        modes = _choices("--mode", mode or ("full" if accuracy else "forward"), tuple(MODES))
        dtypes = _choices("--dtype", dtype, tuple(DTYPES))
        cases = benchmark.select_cases(chosen, None if shapes == ALL else _split("--shapes", shapes))
        if device_spec is not None:
            _predict(device_spec, [*zip(chosen, cases)], modes, dtypes)
            return
        _check_device(device, needed=not dry_run)
        caches = ("hot",) if cache is None and device == "cpu" else _choices("--cache", cache or ALL, CACHES[device])
        wanted = benchmark.select_providers(chosen, None if providers is None else _split("--providers", providers))
        if accuracy and providers is None:
            wanted = [errors.unasked(each) for each in chosen]
        layouts = benchmark.select_layouts(chosen, None if layout == ALL else _split("--layout", layout))
        samples = pairs or PAIRS[device]
        before = None if baseline is None else (str(baseline), _read("--baseline", baseline))
        _check_outputs(out, profile)
        gpu = execution.open_gpu() if device == "cuda" and not dry_run else None
        selections = [
            Selection(op, of, by, modes, dtypes, lying, caches, device, samples, gpu)
            for op, of, by, lying in zip(chosen, cases, wanted, layouts)
            if of and by and lying
        ]
        if accuracy:
            _errors(selections, environment.describe(device))
            return
        if budget is not None:
            selections = [tier for selection in selections for tier in selection.tiers()]
        whole = execution.whole_jobs([name for name in names if name in WHOLE], device, samples, gpu)
        if profile is not None:
            _profile(selections, profile)
            return
        if dry_run:
            _list_rows([*whole, *execution.jobs(selections)])
            return
        described = environment.describe(device)
        if selections:
            spec = execution.limits(device)
            described["limits"] = dataclasses.asdict(spec)
            selections = [dataclasses.replace(selection, spec=spec) for selection in selections]
        measured, left_out = execution.run(
            [*whole, *execution.jobs(selections)],
            None if budget is None else budget - (time.monotonic() - started),
            save=(lambda _: None) if out is None else (lambda so_far: rows.write_jsonl(so_far, described, out)),
        )
    except (_UsageError, benchmark.UnknownName, devices.UnknownDevice, BackendError) as error:
        typer.echo(f"error: {error}", err=True)  # the last from FASTDISTILL_BACKEND
        raise typer.Exit(EXIT_USAGE) from None
    print_report(measured, described, Console())
    for line in execution.describe_left_out(left_out):
        typer.echo(line)
    if out is not None:
        _write(measured, described, out)
    slower = before is not None and _compare(measured, described, *before, threshold)
    if _failed(measured, selections) or slower:
        raise typer.Exit(EXIT_FAILED)


def _errors(selections: Sequence[Selection], described: dict[str, object]) -> None:
    if not selections:
        raise _UsageError(f"--accuracy computes the errors of ops, not of {', '.join(WHOLE)}")
    found = errors.compute(selections, Console(stderr=True))
    errors.print_errors(found, described, Console())
    if not any(row.found for row in found):
        typer.echo("error: nothing was computed; the reasons stand above", err=True)
        raise typer.Exit(EXIT_FAILED)
    if any(row.failed for row in found):
        raise typer.Exit(EXIT_FAILED)


def _predict(
    device: str,
    chosen: Sequence[tuple[benchmark.Benchmark, Sequence[benchmark.Case]]],
    modes: Sequence[str],
    dtypes: Sequence[str],
) -> None:
    if not chosen:
        raise _UsageError(f"--device-spec predicts for ops, not for {', '.join(WHOLE)}")
    print_predictions(chosen, modes, dtypes, devices.find(device), Console())


def _write(measured: list[rows.Row], described: dict[str, object], out: Path) -> None:
    from . import plots

    path = rows.write_jsonl(measured, described, out)
    typer.echo(f"{len(measured)} rows written to {path}")
    try:
        pictures = plots.draw(path, out)
    except plots.NoMatplotlib as error:
        typer.echo(f"no plots: {error}", err=True)
    else:
        typer.echo(f"{len(pictures)} plots written to {out}")


def _compare(measured: list[rows.Row], described: dict[str, object], name: str, before: list, threshold: float) -> bool:
    """Whether anything became slower."""
    found = changes.changes(measured, described, before)
    for line in changes.describe(found, threshold, name):
        typer.echo(line)
    return changes.regressed(found, threshold)


def _failed(measured: Sequence[rows.Row], selections: Sequence[Selection]) -> bool:
    """Peers may be wrong, or not work."""
    peers = {(s.benchmark.op, provider.name) for s in selections for provider in s.providers if provider.peer}
    ours = [row for row in measured if (row.key.op, row.key.provider) not in peers]
    nothing = all(row.speed is None for row in measured)
    if nothing:
        typer.echo("error: nothing was measured; the reasons stand above", err=True)
    return nothing or any(row.status in ("failed", "raised") for row in ours)


def _names(ops: Sequence[str] | None, device_spec: str | None) -> list[str]:
    if not ops and device_spec is None:
        raise _UsageError(f"name an op, or all; known: {', '.join((*benchmark.OPS, *WHOLE))}")
    if not ops or ALL in ops:
        return [*benchmark.OPS, *WHOLE]
    for op in ops:
        if op not in (*benchmark.OPS, *WHOLE):
            raise _UsageError(f"unknown op {op!r}; known: {', '.join((*benchmark.OPS, *WHOLE))}")
    return list(dict.fromkeys(ops))


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


def _check_device(device: str, needed: bool) -> None:
    if device not in DEVICES:
        raise _UsageError(f"--device: cannot time on {device!r}; known: {', '.join(DEVICES)}")
    if device == "cuda" and needed and not torch.cuda.is_available():
        raise _UsageError(
            "--device cuda: torch sees no GPU here; --device-spec h200 predicts without one, --dry-run lists the rows"
        )


def _check_outputs(out: Path | None, profile: Path | None) -> None:
    """Before minutes of measuring, not after."""
    for option, directory in (("--out", out), ("--profile", profile)):
        if directory is None:
            continue
        try:
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            raise _UsageError(f"{option}: cannot write to {directory}: {error.strerror}") from error
    if out is not None and (out / rows.RESULTS).exists():
        _read("--out", out / rows.RESULTS)  # what it holds is kept


def _read(option: str, path: Path) -> list:
    try:
        return rows.read_jsonl(path)
    except OSError as error:
        raise _UsageError(f"{option}: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise _UsageError(f"{option}: {error}") from error


def _profile(selections: Sequence[Selection], directory: Path) -> None:
    from .profiling import profile

    if not selections:
        raise _UsageError(f"--profile calls ops, not {', '.join(WHOLE)}")
    path, names = profile(selections, directory)
    for name in names:
        typer.echo(name)
    typer.echo(f"trace written to {path}: open it at https://ui.perfetto.dev; the ranges are named as above")


def _list_rows(jobs: Sequence[Job]) -> None:
    keys = [key for job in execution.by_importance(jobs) for key in job.keys]
    for key in keys:
        typer.echo(f"{' '.join(key.group)} {key.case}")
    typer.echo(f"{len(keys)} rows")
