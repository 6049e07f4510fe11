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
    "error: largest |difference from float64|, of the result named, which is the one nearest to its limit; "
    "limit: 2 x {baseline}'s error + a rounding floor."
)


def print_report(rows: Sequence[Row], environment: Mapping[str, object], console: Console) -> None:
    """The table, its legend, the providers that were not measured, and the summary."""
    measured = [row for row in rows if row.status != "missing"]
    if measured:
        print_wide(console, table(measured))
        console.print(Text(LEGEND.format(baseline=measured[0].baseline)), style="dim", soft_wrap=True)
    for line in (*missing(rows), *summary(measured), machine(environment)):
        console.print(Text(line), soft_wrap=True)


def table(rows: Sequence[Row]) -> Table:
    """One line per measured row, a rule between groups of one mode, dtype, layout, cache and provider."""
    result = Table(box=box.SIMPLE_HEAD)
    for heading in ("op", "mode", "dtype", "layout", "cache", "provider", "shape"):
        result.add_column(heading, no_wrap=True)
    for heading in ("us", f"{rows[0].baseline} us", "ratio", "20 %", "80 %"):
        result.add_column(heading, justify="right", no_wrap=True)
    for heading in ("of", "error", f"{rows[0].baseline} error", "limit", "verdict"):
        result.add_column(heading, no_wrap=True)
    for group in groups(rows).values():
        for row in group:
            result.add_row(*_cells(row))
        result.add_section()
    return result


def _cells(row: Row) -> list[str | Text]:
    key, speed, accuracy = row.key, row.speed, row.accuracy
    verdict = "FAILED" if row.status == "failed" else row.status
    ratio = Text(f"{speed.ratio:.2f}x", style="green" if speed.ratio >= 1 else "red")
    return [
        *(key.op, key.mode, key.dtype, key.layout, key.cache, key.provider, key.case),
        *(f"{speed.ours_us:.1f}", f"{speed.baseline_us:.1f}", ratio),
        *(f"{speed.ratio_low:.2f}", f"{speed.ratio_high:.2f}"),
        *(accuracy.result, f"{accuracy.error:.1e}", f"{accuracy.baseline_error:.1e}", f"{accuracy.allowed:.1e}"),
        Text(verdict, style=_STYLES[row.status]),
    ]


def print_wide(console: Console, wide: Table) -> None:
    """Print a table at its natural width: a narrow terminal wraps its lines, a file holds them whole."""
    console.width = max(console.width, console.measure(wide, options=console.options.update(width=10_000)).maximum)
    console.print(wide)


def groups(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The rows that differ in their shape alone, in order of first appearance."""
    result: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = row.key
        name = (key.op, key.mode, key.dtype, key.layout, key.cache, key.provider)
        result.setdefault(name, []).append(row)
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
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row.status == "missing":
            name = (row.key.op, row.key.provider, row.missing)
            counts[name] = counts.get(name, 0) + 1
    return [
        f"{op} {provider}: not measured in {count} row{'s' if count > 1 else ''}: {reason}"
        for (op, provider, reason), count in counts.items()
    ]


def machine(environment: Mapping[str, object]) -> str:
    """The environment in a line."""
    e = environment
    return (
        f"{e['cpu']}, {e['threads']} thread{'s' if e['threads'] != 1 else ''} · fastdistill {e['fastdistill']} "
        f"({e['capability']}, commit {e['commit'] or 'unknown'}) · torch {e['torch']} ({e['torch_capability']}) "
        f"· Python {e['python']}"
    )
