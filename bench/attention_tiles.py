"""How attention is cut into tiles, by libraries and by this package's Triton kernels: what is padding, and how many
blocks there are. Counted from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .benchmark import Case
from .devices import DeviceSpec
from .roofline import Cost
from .tiling import Kernel, Tiling

if TYPE_CHECKING:
    from fastdistill.kernels.launch import Launch

PRODUCTS = {"forward": 2, "backward": 5}


@dataclass(frozen=True)
class Library:
    """(queries, keys) of a tile by the head dim that a kernel is built for; others are padded to the next."""

    name: str
    forward: Mapping[int, tuple[int, int]]
    backward: Mapping[int, tuple[int, int]]


# As their sources have them for sm_90 in 16 bit, without mask or dropout (github.com/Dao-AILab/flash-attention, read in
# November 2026): csrc/flash_attn/src/flash_fwd_launch_template.h and flash_bwd_launch_template.h; hopper/tile_size.h
# and hopper/flash_bwd_launch_template.h. A version that torch brings may be older. A forward program owns queries, a
# backward one keys, with all five products in one kernel. Left out: kernels that prepare or convert, workspaces, and
# the split over keys that some versions make of few blocks. cuDNN's tiles are not published.
LIBRARIES = (
    Library(
        "FlashAttention-2",
        {64: (128, 128), 96: (128, 64), 128: (128, 64), 192: (128, 64), 256: (64, 64)},
        {64: (128, 128), 96: (64, 128), 128: (64, 128), 192: (64, 64), 256: (64, 64)},
    ),
    Library(
        "FlashAttention-3",
        {64: (192, 192), 96: (192, 144), 128: (128, 176), 192: (128, 112), 256: (128, 80)},
        {64: (128, 128), 96: (64, 128), 128: (80, 128), 192: (64, 96), 256: (64, 80)},
    ),
)


def tilings(
    cost: Callable[[Case, torch.dtype, str], Cost], case: Case, dtype: torch.dtype, mode: str, device: DeviceSpec
) -> list[Tiling]:
    """Of every library that has a kernel for the case, and ours where it can be planned for the device."""
    passes = ("forward", "backward") if mode == "full" else (mode,)
    found = [ours(case.shape, dtype, passes, device.multiprocessors)]
    if dtype.itemsize == 2:
        least = {each: cost(case, dtype, each).bytes for each in passes}
        if mode == "full":  # a forward pass that a backward follows keeps the log-sum-exp
            least["forward"] = cost(case, dtype, mode).bytes - least["backward"]
        found = [*(of_library(library, case.shape, least) for library in LIBRARIES), *found]
    return [each for each in found if each is not None]


def of_library(library: Library, shape: tuple[int, ...], least: Mapping[str, int]) -> Tiling | None:
    """None where it has no kernel for the head dim. `least`: the bytes of each pass."""
    heads, queries, keys, width = shape
    padded_width = next((each for each in library.forward if each >= width), None)
    if padded_width is None:
        return None
    kernels = []
    for each, nbytes in least.items():
        tile = getattr(library, each)[padded_width]
        padded_queries, padded_keys = _up(queries, tile[0]), _up(keys, tile[1])
        flops = PRODUCTS[each] * 2 * heads * padded_queries * padded_keys * padded_width
        owned = padded_queries // tile[0] if each == "forward" else padded_keys // tile[1]
        kernels.append(Kernel(f"{tile[0]}x{tile[1]}", heads * owned, Cost(nbytes, flops)))
    return Tiling(library.name, tuple(kernels))


def ours(shape: tuple[int, ...], dtype: torch.dtype, passes: Sequence[str], multiprocessors: int) -> Tiling | None:
    """Of the Triton kernels, from the plan of their launches. Without a GPU they are planned for one number of
    multiprocessors: None for any other."""
    from fastdistill.kernels.attention.backward import plan_backward
    from fastdistill.kernels.attention.forward import plan_forward
    from fastdistill.kernels.attention.tiles import multiprocessors as planned_for

    if multiprocessors != planned_for(torch.device("meta")):
        return None
    heads, queries, keys, width = shape
    q, k = (torch.empty(1, n, heads, width, dtype=dtype, device="meta").transpose(1, 2) for n in (queries, keys))
    forward, (o, lse) = plan_forward(q, k, k.clone(), 1.0)
    plans = {"forward": forward, "backward": plan_backward(q.clone(), q, k, k.clone(), o, lse, 1.0)[0]}
    return Tiling("triton", tuple(_kernel(launch) for each in passes for launch in plans[each]))


def _kernel(launch: Launch) -> Kernel:
    """Operations are those of the matrix products."""
    of, arguments = launch.constexprs, launch.arguments
    tensors = {id(t): t.nbytes for t in arguments.values() if isinstance(t, torch.Tensor)}
    splits = arguments.get("splits", 1)
    name = launch.kernel.__name__.strip("_")
    if name in ("combine_kernel", "sum_splits_kernel"):
        return Kernel(f"{splits} splits added", launch.programs, Cost(sum(tensors.values()), 0))
    # Of a head that is divided among programs each takes the whole q kᵀ, in the backward chunk by chunk, and a part of
    # the columns of the results.
    whole = _width(of["SLICES"])
    part = _width(of["PART_SLICES"]) if "PART_SLICES" in of else whole
    inner = _up(of["D"], of["CHUNK"]) if of.get("PARTS", 1) > 1 and "CHUNK" in of else whole
    columns = {
        "forward_short_kernel": whole + part,
        "forward_kernel": whole + part,
        "backward_queries_kernel": 2 * inner + part,
        "backward_keys_kernel": 2 * inner + 2 * part,
        "backward_short_kernel": 5 * whole,
    }[name]
    owns_keys = name in ("backward_keys_kernel", "backward_short_kernel")
    held = _width(of["KEYS"]) if "KEYS" in of else None  # all keys at once
    block, step = of.get("BLOCK", held), of.get("STEP", held)
    walked = _up(arguments["queries" if owns_keys else "keys"], step)
    flops = 2 * (launch.programs // splits) * block * walked * columns
    tile = f"{step}x{block}" if owns_keys else f"{block}x{step}"  # queries x keys
    in_splits = f" in {splits} splits" if splits > 1 else ""
    return Kernel(tile + in_splits, launch.programs, Cost(sum(tensors.values()), flops))


def _width(slices: Sequence[tuple[int, int]]) -> int:
    return sum(width for _, width in slices)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
