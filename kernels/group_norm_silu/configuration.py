"""Limits and shapes of the Triton programs, per GPU: the one place that a measurement changes.

The entries follow from data sheets and from what the compiler reports; none is timed. The choice never looks at the
load of a device: the same call launches the same programs on every GPU with the same entry, and so sums in the same
order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Configuration:
    # Elements of a tile that stays in registers, 16 warps at most. Twice as much spills when compiled for sm_80, sm_90
    # and sm_100 (up to 264 bytes per thread forward, 200 backward); this does not, which the ahead-of-time gate holds.
    max_whole_forward: int = 16384
    max_whole_backward: int = 8192
    # Of a whole tile, while there are warps for it: enough loads in flight without making a small tile wait for itself.
    whole_elements_per_thread: int = 16

    # A split tile has so many warps, a square one for mixed layouts as many as its elements need. The backward keeps
    # five values per element (x, grad_y and three sums), the forward three.
    split_warps: int = 8
    square: int = 64  # a 128-byte line of a 16-bit tensor, in either direction
    forward_elements_per_thread: int = 16
    backward_elements_per_thread: int = 8

    combine_elements: int = 1024
    combine_warps: int = 8

    # Programs beyond which each walks over several tiles: what is resident at once, 8 programs of 8 warps on each of
    # 132 multiprocessors.
    programs_per_wave: int = 1056
    max_tiles_per_program: int = 16  # by then the partial results are about 1 % of the traffic


DEFAULT = Configuration()

# By name of the device, else by compute capability, else the default.
BY_NAME: dict[str, Configuration] = {}
BY_CAPABILITY: dict[tuple[int, int], Configuration] = {
    (8, 0): replace(DEFAULT, programs_per_wave=8 * 108),
    (8, 9): replace(DEFAULT, programs_per_wave=6 * 128),  # 1536 threads on a multiprocessor
    (10, 0): replace(DEFAULT, programs_per_wave=8 * 148),
}


def configuration_for(device: torch.device) -> Configuration:
    """The entry of a CUDA device; the default for any other, `meta` and the interpreter's CPU among them."""
    return _of_gpu(device.index) if device.type == "cuda" else DEFAULT


@functools.cache
def _of_gpu(index: int | None) -> Configuration:
    by_capability = BY_CAPABILITY.get(torch.cuda.get_device_capability(index), DEFAULT)
    return BY_NAME.get(torch.cuda.get_device_name(index), by_capability)


def configurations() -> list[Configuration]:
    """Every different entry, for the ahead-of-time gate."""
    return list(dict.fromkeys((DEFAULT, *BY_CAPABILITY.values(), *BY_NAME.values())))
