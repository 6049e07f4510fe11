"""Rows as a table for people, and a summary of them in a line each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .rows import Row

_STYLES = {"ok": "green", "failed": "bold red", "missing": "dim"}

LEGEND = (
    "ratio: {baseline}'s time / the provider's, median over the pairs (above 1: the provider is faster), with its 20 % "
    "and 80 % quantiles.\n"
    "rate: what must be moved or computed at least, over the time; limit: that in percent of what this machine's copy "
    "(or matmul) reaches, above 100 where the data stays in a cache.\n"
    "peak: memory allocated at one time beyond the inputs, in MiB. launches: on a GPU kernels, copies and fills of a "
    "call, on a CPU its ops.\n"
    "error: largest |difference from float64|, of the result named, which is the one nearest to its limit; "
    "allowed: 2 x {baseline}'s error + a rounding floor."
)


def print_report(rows: Sequence[Row], environment: Mapping[str, object], console: Console) -> None:
    """The table, its legend, the providers that were not measured, and the summary."""
    measured = [row for row in rows if row.speed is not None]
    if measured:
        print_wide(console, table(measured))
        console.print(Text(LEGEND.format(baseline=_baseline(measured))), style="dim", soft_wrap=True)
    for line in (*missing(rows), *notes(rows), *summary(measured), machine(environment)):
        console.print(Text(line), soft_wrap=True)


def table(rows: Sequence[Row]) -> Table:
    """One line per measured row, a rule between groups of one mode, dtype, layout, cache and provider."""
    result, baseline = Table(box=box.SIMPLE_HEAD), _baseline(rows)
    for heading in ("op", "mode", "dtype", "layout", "cache", "provider", "shape"):
        result.add_column(heading, no_wrap=True)
    for heading in ("us", f"{baseline} us", "ratio", "20 %", "80 %", "rate", "limit", "peak", "launches"):
        result.add_column(heading, justify="right", no_wrap=True)
    for heading in ("of", "error", f"{baseline} error", "allowed", "verdict"):
        result.add_column(heading, no_wrap=True)
    for group in groups(rows).values():
        for row in group:
            result.add_row(*_cells(row))
        result.add_section()
    return result


def _baseline(rows: Sequence[Row]) -> str:
    names = {row.baseline for row in rows}
    return names.pop() if len(names) == 1 else "baseline"


def _cells(row: Row) -> list[str | Text]:
    key, speed, accuracy, usage = row.key, row.speed, row.accuracy, row.usage
    verdict = "FAILED" if row.status == "failed" else row.status
    ratio = Text(f"{speed.ratio:.2f}x", style="green" if speed.ratio >= 1 else "red")
    return [
        *(key.op, key.mode, key.dtype, key.layout, key.cache, key.provider, key.case),
        *(f"{speed.ours_us:.1f}", f"{speed.baseline_us:.1f}", ratio),
        *(f"{speed.ratio_low:.2f}", f"{speed.ratio_high:.2f}"),
        *(rate(row), "-" if row.percent is None else f"{row.percent:.0f}%"),
        "-" if usage.peak_bytes is None else f"{usage.peak_bytes / 2**20:.2f}",
        "-" if usage.launches is None else f"{usage.launches:g}",
        *(accuracy.result, f"{accuracy.error:.1e}", f"{accuracy.baseline_error:.1e}", f"{accuracy.allowed:.1e}"),
        Text(verdict, style=_STYLES[row.status]),
    ]


def rate(row: Row) -> str:
    """What the call reaches of that which limits it: "123GB/s" or "1.2TFLOP/s"."""
    if row.limit is None:
        return "-"
    if row.limit.bound == "memory":
        return f"{row.limit.gigabytes_per_second(row.speed.ours_us):.3g}GB/s"
    return f"{row.limit.teraflops(row.speed.ours_us):.3g}TFLOP/s"


def print_wide(console: Console, wide: Table) -> None:
    """Print a table at its natural width: a narrow terminal wraps its lines, a file holds them whole."""
    console.width = max(console.width, console.measure(wide, options=console.options.update(width=10_000)).maximum)
    console.print(wide)


def groups(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The rows that differ in their shape alone, in order of first appearance."""
    result: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        result.setdefault(row.key.group, []).append(row)
    return result


def summary(measured: Sequence[Row]) -> list[str]:
    """Per group: the median ratio over its rows, the worst row, and how many failed."""
    lines = []
    for name, rows in groups(measured).items():
        worst = min(rows, key=lambda row: row.speed.ratio)
        line = (
            f"{' '.join(name)}: median {statistics.median(row.speed.ratio for row in rows):.2f}x over {len(rows)} "
            f"shape{'s' if len(rows) > 1 else ''}, worst {worst.speed.ratio:.2f}x ({worst.key.case})"
        )
        failed = [row for row in rows if row.status == "failed"]
        if failed:
            line += f"; {len(failed)} FAILED: {', '.join(row.key.case for row in failed)}"
        lines.append(line)
    return lines


def missing(rows: Sequence[Row]) -> list[str]:
    """What was not measured, and why: a line per provider and reason."""
    return _counted(rows, "not measured", lambda row: row.missing)


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the measured rows must know: a line per provider and note."""
    return _counted(rows, "noted", lambda row: "" if row.missing else row.note)


def _counted(rows: Sequence[Row], what: str, text) -> list[str]:
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if text(row):
            name = (row.key.op, row.key.provider, text(row))
            counts[name] = counts.get(name, 0) + 1
    return [
        f"{op} {provider}: {what} in {count} row{'s' if count > 1 else ''}: {reason}"
        for (op, provider, reason), count in counts.items()
    ]


def machine(environment: Mapping[str, object]) -> str:
    """The environment in a line."""
    e = environment
    gpu = f"{e['gpu']}, driver {e['driver']}, CUDA {e['cuda']}, cuDNN {e['cudnn']} · " if "gpu" in e else ""
    limits = e.get("limits")
    return (
        f"{gpu}{e['cpu']}, {e['threads']} thread{'s' if e['threads'] != 1 else ''} · fastdistill {e['fastdistill']} "
        f"({e['capability']}, commit {e['commit'] or 'unknown'}) · torch {e['torch']} ({e['torch_capability']}) "
        f"· Python {e['python']}" + (f" · {limits_of(limits)}" if limits else "")
    )


def limits_of(limits: Mapping[str, object]) -> str:
    """A device's figures in words."""
    rates = ", ".join(f"{rate:g} TFLOP/s in {dtype}" for dtype, rate in limits["matmul_tflop_s"].items())
    launch = limits.get("launch_us")
    return f"copy {limits['copy_gb_s']:g} GB/s, matmul {rates}" + (f", empty launch {launch:g} us" if launch else "")
