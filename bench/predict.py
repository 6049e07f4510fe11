"""Predictions: the least time of every case on a device that is known by its figures alone. Nothing is run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .benchmark import Benchmark, Case
from .devices import DeviceSpec
from .report import limits_of, print_wide
from .roofline import limit
from .runner import DTYPES


def print_predictions(
    chosen: Sequence[tuple[Benchmark, Sequence[Case]]],
    modes: Sequence[str],
    dtypes: Sequence[str],
    device: DeviceSpec,
    console: Console,
) -> None:
    """A line per op, mode, dtype and case. Layouts move the same bytes."""
    figures = {"copy_gb_s": device.copy_gb_s, "matmul_tflop_s": device.matmul_tflop_s, "launch_us": device.launch_us}
    source = f" ({device.source})" if device.source else ""
    console.print(Text(f"PREDICTED, not measured: {device.name}, {limits_of(figures)}{source}"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("op", "mode", "dtype", "shape", "suites"):
        table.add_column(heading, no_wrap=True)
    for heading in ("MB", "MFLOP", "predicted us"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("limited by", no_wrap=True)
    for (benchmark, cases), mode, dtype in itertools.product(chosen, modes, dtypes):
        for case in cases:
            least = limit(benchmark.cost(case, DTYPES[dtype], mode), DTYPES[dtype], device)
            table.add_row(
                *(benchmark.op, mode, dtype, case.name, ",".join(case.suites)),
                *(f"{least.bytes / 1e6:.2f}", f"{least.flops / 1e6:.1f}", f"{least.us:.2f}"),
                least.bound,
            )
        table.add_section()
    print_wide(console, table)
    launch = "unknown for this device" if device.launch_us is None else f"{device.launch_us:g} us on this device"
    console.print(
        Text(
            "predicted us: max(bytes / copy bandwidth, operations / matmul rate), each input read once and each result "
            f"written once. Beside it stands the floor of any call, an empty launch ({launch}); what fits a cache can "
            "be faster."
        ),
        style="dim",
        soft_wrap=True,
    )
    _print_tilings([pair for pair in chosen if pair[0].tilings], modes, dtypes, device, console)


def _print_tilings(
    chosen: Sequence[tuple[Benchmark, Sequence[Case]]],
    modes: Sequence[str],
    dtypes: Sequence[str],
    device: DeviceSpec,
    console: Console,
) -> None:
    """A line per op, mode, dtype, case and implementation."""
    if not chosen or device.multiprocessors is None:
        return
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("op", "mode", "dtype", "shape", "by", "tiles"):
        table.add_column(heading, no_wrap=True)
    for heading in ("useful MFLOP", "padded MFLOP", "useful", "blocks", "waves", "MB", "predicted us"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (benchmark, cases), mode, dtype in itertools.product(chosen, modes, dtypes):
        for case in cases:
            useful = benchmark.cost(case, DTYPES[dtype], mode).flops
            for tiling in benchmark.tilings(case, DTYPES[dtype], mode, device):
                done = tiling.cost
                table.add_row(
                    *(benchmark.op, mode, dtype, case.name, tiling.by, tiling.tiles),
                    *(f"{useful / 1e6:.1f}", f"{done.flops / 1e6:.1f}", f"{100 * useful / done.flops:.0f} %"),
                    *(tiling.blocks, tiling.waves(device.multiprocessors), f"{done.bytes / 1e6:.2f}"),
                    f"{tiling.us(DTYPES[dtype], device):.2f}",
                )
        table.add_section()
    console.print(Text(f"COUNTED, not measured: tiles on {device.multiprocessors} multiprocessors"), soft_wrap=True)
    print_wide(console, table)
    console.print(
        Text(
            "padded MFLOP: operations of whole tiles; useful: the share of them that is not padding or done twice. "
            "Kernels of one call stand in their order, joined by +. waves: with one block on a multiprocessor at a "
            "time. predicted us: padding included, on a device that every kernel fills, which less than a wave does "
            "not."
        ),
        style="dim",
        soft_wrap=True,
    )
