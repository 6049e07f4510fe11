"""What the forward and the backward plans have in common."""

from __future__ import annotations

import torch
import triton

from ..launch import Argument, Launch
from .tiles import Problem, WholeTile, ncs_strides

Arguments = dict[str, Argument]


def stride_arguments(**tensors: torch.Tensor) -> Arguments:
    """`x_stride_n`, `x_stride_c`, `x_stride_s` for a tensor passed as `x`."""
    return {
        f"{name}_stride_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip("ncs", ncs_strides(tensor))
    }


def channel_arguments(weight: torch.Tensor | None, bias: torch.Tensor | None, add: torch.Tensor | None) -> Arguments:
    """The per-channel parameters. A missing one is None and its strides 1: both are compiled in and cost nothing."""
    return {
        "weight_ptr": weight,
        "bias_ptr": bias,
        "add_ptr": add,
        "weight_stride": 1 if weight is None else weight.stride(0),
        "bias_stride": 1 if bias is None else bias.stride(0),
        "add_stride_n": 1 if add is None else add.stride(0),
        "add_stride_c": 1 if add is None else add.stride(1),
    }


def plan_whole(
    kernel: triton.JITFunction, problem: Problem, tile: WholeTile, arguments: Arguments, silu: bool
) -> Launch:
    """The one launch of the whole regime."""
    tiles = triton.cdiv(problem.groups, tile.groups)
    blocks = {"BLOCK_C": tile.block_c, "BLOCK_S": tile.block_s, "BLOCK_G": tile.block_g}
    return Launch.of(
        kernel,
        programs=problem.batch * tiles,
        arguments=arguments | {"units_per_tile": tile.channels // tile.channel_unit, "tiles": tiles},
        constexprs={"SILU": silu, "CHANNEL_UNIT": tile.channel_unit} | blocks,
        num_warps=tile.num_warps,
        # Up to 8 warps may use all registers there are: left alone, the assembler may stop early and spill to fit one
        # program more. 16 warps cannot have more than 128 per thread as it is.
        maxnreg=255 if tile.num_warps <= 8 else None,
    )
