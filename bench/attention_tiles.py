"""How much of attention's forward pass is padding, and how full the device is.

`python -m fastdistill.bench.attention_tiles` prints it, counted from shapes alone, for tiles as libraries use them and
for the tiles that this package's Triton kernels would take on the device. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import devices
from .attention import BENCHMARK
from .report import print_wide

# (queries, keys) of a tile, and the head dims that libraries have kernels for: others are padded to the next.
LIBRARY_TILES = ((128, 64), (128, 128), (64, 64))
LIBRARY_HEAD_DIMS = (64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Tiling:
    """name: of the tile, queries x keys. flops: of both products, padding included. blocks: given to the device."""

    name: str
    flops: int
    blocks: int

    def useful(self, flops: int) -> float:
        """Of its work, in percent."""
        return 100 * flops / self.flops

    def waves(self, multiprocessors: int) -> float:
        """With one block on a multiprocessor at a time."""
        return self.blocks / multiprocessors


def useful_flops(shape: tuple[int, ...]) -> int:
    heads, queries, keys, width = shape
    return 4 * heads * queries * keys * width


def library_tiling(shape: tuple[int, ...], tile: tuple[int, int]) -> Tiling | None:
    """None where no library has a kernel for the head dim."""
    heads, queries, keys, width = shape
    padded_width = next((each for each in LIBRARY_HEAD_DIMS if each >= width), None)
    if padded_width is None:
        return None
    padded_queries, padded_keys = (-(-size // step) * step for size, step in zip((queries, keys), tile))
    flops = useful_flops((heads, padded_queries, padded_keys, padded_width))
    return Tiling(f"{tile[0]}x{tile[1]}", flops, heads * padded_queries // tile[0])


def own_tiling(shape: tuple[int, ...], multiprocessors: int) -> Tiling | None:
    """Of the Triton kernels in 16 bit, from the plan of their launches. Without a GPU they are planned for one number
    of multiprocessors: None for any other."""
    from fastdistill.kernels.attention.forward import plan_forward
    from fastdistill.kernels.attention.tiles import multiprocessors as planned_for

    if multiprocessors != planned_for(torch.device("meta")):
        return None
    heads, queries, keys, width = shape
    q, k = (torch.empty(1, heads, n, width, dtype=torch.bfloat16, device="meta") for n in (queries, keys))
    launch = plan_forward(q, k, k, 1.0)[0][0]
    of, splits = launch.constexprs, launch.arguments.get("splits", 1)
    # All keys at once, or step by step.
    step = _width(of["KEYS"]) if "KEYS" in of else of["STEP"]
    # Each part of a divided head takes the whole q kᵀ and its own columns of the second product.
    widths = _width(of["SLICES"]) + _width(of["PART_SLICES"])
    flops = 2 * launch.programs // splits * of["BLOCK"] * (-(-keys // step) * step) * widths
    return Tiling(f"{of['BLOCK']}x{step}" + f", {splits} splits" * (splits > 1), flops, launch.programs)


def _width(slices: Sequence[tuple[int, int]]) -> int:
    return sum(width for _, width in slices)


def table(device: devices.DeviceSpec) -> Table:
    """A line per site: for each tile useful percent, blocks, waves."""
    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("site", no_wrap=True)
    result.add_column("suites", no_wrap=True)
    result.add_column("GFLOP", justify="right", no_wrap=True)
    for heading in (*(f"{rows}x{keys}" for rows, keys in LIBRARY_TILES), "ours", "our tile"):
        result.add_column(heading, justify="left" if heading == "our tile" else "right", no_wrap=True)
    for case in BENCHMARK.cases:
        useful = useful_flops(case.shape)
        own = own_tiling(case.shape, device.multiprocessors)
        tilings = [*(library_tiling(case.shape, tile) for tile in LIBRARY_TILES), own]
        cells = [
            "-"
            if each is None
            else f"{each.useful(useful):.0f} % {each.blocks} {each.waves(device.multiprocessors):.2f}"
            for each in tilings
        ]
        result.add_row(case.name, ",".join(case.suites), f"{useful / 1e9:.2f}", *cells, own.name if own else "-")
    return result


def main(
    device_spec: Annotated[str, typer.Option(help=f"of {', '.join(devices.KNOWN)}, or a JSON file")] = "h200",
) -> None:
    """Print useful work, blocks and waves of attention's forward pass per site, for libraries' tiles and for ours."""
    try:
        device = devices.find(device_spec)
    except devices.UnknownDevice as error:
        raise typer.BadParameter(str(error), param_hint="--device-spec") from None
    if device.multiprocessors is None:
        raise typer.BadParameter(f"{device.name}: needs multiprocessors", param_hint="--device-spec")
    console = Console()
    console.print(Text(f"COUNTED, not measured: {device.name}, {device.multiprocessors} multiprocessors, 16 bit"))
    print_wide(console, table(device))
    console.print(
        Text(
            "Per tile (queries x keys): useful share of the products' operations, blocks, waves with one block on a "
            f"multiprocessor at a time. Libraries' tiles with the head dim padded to {LIBRARY_HEAD_DIMS}; '-': no such "
            "kernel."
        ),
        style="dim",
        soft_wrap=True,
    )


if __name__ == "__main__":
    typer.run(main)
