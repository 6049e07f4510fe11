"""The errors of every provider against float64, without timing anything: `--accuracy`.

Every result has a line of its own. On a CPU a case that takes too long is represented by a smaller one, which the table
names.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from fastdistill.ops import BackendError, _kernels

from . import accuracy
from .accuracy import Accuracy
from .benchmark import Benchmark, Case, Provider
from .modes import MODES
from .report import machine, print_wide
from .runner import DTYPES, Selection

_SEED = 0


@dataclass(frozen=True)
class Errors:
    """Of one provider at one site: an accuracy per result, or the reason why there is none.

    computed: the case that stands for the site.
    """

    benchmark: Benchmark
    provider: Provider
    mode: str
    dtype: str
    layout: str
    case: Case
    computed: Case
    found: tuple[Accuracy, ...] = ()
    missing: str = ""
    raised: bool = False

    @property
    def failed(self) -> bool:
        """Someone else's errors are shown, but are no failure of this package."""
        return not self.provider.peer and (self.raised or not all(each.ok for each in self.found))


def unasked(benchmark: Benchmark) -> tuple[Provider, ...]:
    """Everyone but the baseline, against whom it is, and `torch.compile`, whose kernels it has no say in."""
    return tuple(p for p in benchmark.providers if p.name != benchmark.baseline.name and not p.compiled)


def compute(selections: Sequence[Selection], console: Console) -> list[Errors]:
    """For all of the selections, with a progress bar on a terminal; what they say of caches and pairs is ignored."""
    sites = [
        (selection, *site)
        for selection in selections
        for site in itertools.product(selection.modes, selection.dtypes, selection.layouts, selection.cases)
    ]
    shown = track(sites, "errors", console=console, transient=True, disable=not console.is_terminal)
    return [each for site in shown for each in _of_site(*site)]


def _of_site(selection: Selection, mode: str, dtype: str, layout: str, case: Case) -> Iterator[Errors]:
    benchmark, on_cpu = selection.benchmark, selection.gpu is None
    interpreted = on_cpu and _kernels.interpreting()
    computed = benchmark.smaller(case, interpreted) if on_cpu else case
    device = torch.device("cpu") if on_cpu else selection.gpu.device
    torch.manual_seed(_SEED)
    inputs, step = benchmark.setup(computed, DTYPES[dtype], layout, device), MODES[mode]
    truth = None
    for provider in selection.providers:
        row = Errors(benchmark, provider, mode, dtype, layout, case, computed)
        reasons = provider.missing(inputs)
        if reasons:
            yield dataclasses.replace(row, missing="; ".join(reasons))
            continue
        if truth is None:
            baseline = benchmark.baseline.prepare(inputs)
            truth = step(baseline, inputs).tensors(), step(baseline, inputs.to(torch.float64)).tensors()
        try:
            results = step(provider.prepare(inputs), provider.adapt(inputs)).tensors()
        except BackendError:
            raise  # asked for by the user's own environment
        except Exception as error:  # a defect of one must not cost the figures of all others
            yield dataclasses.replace(row, missing=f"raised {type(error).__name__}: {error}", raised=True)
            continue
        found = accuracy.each(results, *truth, DTYPES[dtype])
        if interpreted and dtype == "bfloat16":
            found = tuple(map(_truncated, found))
        yield dataclasses.replace(row, found=found)


def _truncated(found: Accuracy) -> Accuracy:
    """Triton's interpreter truncates float32 to bfloat16 where the hardware rounds: the floor is a whole unit."""
    return dataclasses.replace(found, allowed=2 * (found.allowed - found.baseline_error))


def print_errors(rows: Sequence[Errors], described: Mapping[str, object], console: Console) -> None:
    """A line per result, who was left out and why, and for each provider and dtype the result nearest to its limit."""
    if any(row.found for row in rows):
        print_wide(console, _table(rows))
        console.print(
            Text(
                "error: largest |difference from float64|; baseline: that of the op written in PyTorch, in the same "
                "dtype; allowed: twice the baseline's plus a rounding floor (in Triton's interpreter twice that in "
                "bfloat16, which it truncates). computed: a smaller case where the whole one takes too long."
            ),
            style="dim",
            soft_wrap=True,
        )
    for line in (*_missing(rows), *summary(rows), machine(described)):
        console.print(Text(line), soft_wrap=True)


def _table(rows: Iterable[Errors]) -> Table:
    result = Table(box=box.SIMPLE_HEAD)
    for heading in ("op", "mode", "dtype", "layout", "provider", "shape", "computed", "result"):
        result.add_column(heading, no_wrap=True)
    for heading in ("error", "baseline", "allowed", "of it"):
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("verdict", no_wrap=True)
    for row in rows:
        where = "whole" if row.computed == row.case else row.computed.name
        for each in row.found:
            result.add_row(
                *(row.benchmark.op, row.mode, row.dtype, row.layout, row.provider.name, row.case.name, where),
                *(each.result, f"{each.error:.1e}", f"{each.baseline_error:.1e}", f"{each.allowed:.1e}"),
                f"{100 * each.share:.0f} %",
                Text("ok", style="green") if each.ok else Text("FAILED", style="bold red"),
            )
    return result


def summary(rows: Iterable[Errors]) -> list[str]:
    """Per op, mode, dtype and provider: the result nearest to its limit over all sites."""
    groups: dict[tuple[str, ...], list[tuple[Accuracy, Errors]]] = {}
    for row in rows:
        group = groups.setdefault((row.benchmark.op, row.mode, row.dtype, row.provider.name), [])
        group += [(each, row) for each in row.found]
    lines = []
    for name, found in groups.items():
        if not found:
            continue
        nearest, row = max(found, key=lambda pair: pair[0].share)
        failed = sum(not each.ok for each, _ in found)
        lines.append(
            f"{' '.join(name)}: {len(found)} results{f', {failed} FAILED' if failed else ''}; nearest to its limit: "
            f"{nearest.result} at {row.case.name}, {nearest.error:.1e} of {nearest.allowed:.1e} "
            f"({row.benchmark.baseline.name} {nearest.baseline_error:.1e})"
        )
    return lines


def _missing(rows: Iterable[Errors]) -> list[str]:
    counts = Counter((row.benchmark.op, row.provider.name, row.missing) for row in rows if row.missing)
    return [
        f"{op} {provider}: not computed at {count} site{'s' if count > 1 else ''}: {reason}"
        for (op, provider, reason), count in counts.items()
    ]
