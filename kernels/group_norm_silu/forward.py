"""Forward kernels of GroupNorm + SiLU and the plan of their launches.

*Whole*: one launch; a program holds whole groups in registers. *Split*: one launch for moments per channel and run
of pixels, one that combines them per group, one that applies them.

Statistics are two-pass inside a tile, combined across tiles after Chan, Golub and LeVeque (1979), "Updating
formulae and a pairwise algorithm for computing sample variances": never E[x^2] - E[x]^2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Launch
from .configuration import Configuration, configuration_for
from .device import (
    COMBINE_RUNTIME_SIZES,
    RUNTIME_SIZES,
    activate,
    group_totals,
    load_channel_values,
    tile_pointers,
    two_sum,
)
from .plan import Arguments, channel_arguments, plan_whole, stride_arguments
from .tiles import Problem, SplitTile, choose_split_tile, choose_whole_tile


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _forward_whole_kernel(
    x_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    y_stride_n,
    y_stride_c,
    y_stride_s,
    weight_stride,
    bias_stride,
    add_stride_n,
    add_stride_c,
    channels,
    pixels,
    groups,
    channels_per_group,
    units_per_tile,
    tiles,
    elements,
    eps,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n = program // tiles
    channels_per_tile = units_per_tile * CHANNEL_UNIT
    lane = tl.arange(0, BLOCK_C)
    c = program % tiles * channels_per_tile + lane
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    in_tile = (lane < channels_per_tile) & (c < channels)
    mask = in_tile[:, None] & (s < pixels)[None, :]
    slot = tl.where(in_tile, lane // channels_per_group, BLOCK_G)

    x = tl.load(tile_pointers(x_ptr, n, c, s, x_stride_n, x_stride_c, x_stride_s), mask=mask, other=0.0)
    add = load_channel_values(add_ptr, n * add_stride_n + c * add_stride_c, in_tile, 0.0)
    u = tl.where(mask, x.to(tl.float32) + add[:, None], 0.0)

    # The mean is kept as (mean, drift): subtracting the rounded mean is exact near it, and its own rounding error
    # comes back as the mean of the differences, so |mean| >> std costs no digits.
    mean = group_totals(tl.sum(u, axis=1), slot, BLOCK_G) / elements
    centred = tl.where(mask, u - mean[:, None], 0.0)
    drift = group_totals(tl.sum(centred, axis=1), slot, BLOCK_G) / elements
    variance = group_totals(tl.sum(centred * centred, axis=1), slot, BLOCK_G) / elements - drift * drift
    variance = tl.where(variance < 0.0, 0.0, variance)  # not maximum(): NaN must stay NaN
    rstd = 1.0 / tl.sqrt_rn(variance + eps)

    scale = rstd * load_channel_values(weight_ptr, c * weight_stride, in_tile, 1.0)
    shift = load_channel_values(bias_ptr, c * bias_stride, in_tile, 0.0) - drift * scale
    y = activate(centred * scale[:, None] + shift[:, None], SILU)
    y_ptrs = tile_pointers(y_ptr, n, c, s, y_stride_n, y_stride_c, y_stride_s)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)

    group = n * groups + c // channels_per_group
    first_of_group = in_tile & (lane % channels_per_group == 0)
    tl.store(mean_ptr + group, mean + drift, mask=first_of_group)
    tl.store(rstd_ptr + group, rstd, mask=first_of_group)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _moments_kernel(
    x_ptr,
    partial_ptr,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    channels,
    pixels,
    pixels_per_split,
    splits,
    channel_tiles,
    partial_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Moments of x per channel, over one run of pixels; `partial` (3, N, splits, C) holds a reference, the mean's drift
    from it, and the sum of squared deviations from the mean."""
    program = tl.program_id(0).to(tl.int64)
    split = program // channel_tiles % splits
    n = program // channel_tiles // splits
    c = program % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    start = split * pixels_per_split
    stop = tl.minimum(start + pixels_per_split, pixels)
    s = start + tl.arange(0, BLOCK_S)
    in_channels = c < channels

    mask = in_channels[:, None] & (s < stop)[None, :]
    x_ptrs = tile_pointers(x_ptr, n, c, s, x_stride_n, x_stride_c, x_stride_s)
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    # Differences to the mean of the first tile are small enough to be summed without loss, whatever |mean| / std is.
    # Should that tile lie far from the others, it makes the variance large as well: at most a factor of
    # tiles_per_program is lost in the subtraction below.
    reference = tl.sum(x, axis=1) / tl.minimum(stop - start, BLOCK_S).to(tl.float32)
    centred = tl.where(mask, x - reference[:, None], 0.0)
    first_moment = centred
    second_moment = centred * centred
    for offset in range(BLOCK_S, stop - start, BLOCK_S):
        mask = in_channels[:, None] & (s + offset < stop)[None, :]
        x = tl.load(x_ptrs + offset * x_stride_s, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - reference[:, None], 0.0)
        first_moment += centred
        second_moment += centred * centred

    total = tl.sum(first_moment, axis=1)
    drift = total / (stop - start).to(tl.float32)
    m2 = tl.sum(second_moment, axis=1) - total * drift
    row = partial_ptr + (n * splits + split) * channels + c
    tl.store(row, reference, mask=in_channels)
    tl.store(row + partial_stride, drift, mask=in_channels)
    tl.store(row + 2 * partial_stride, tl.where(m2 < 0.0, 0.0, m2), mask=in_channels)


@triton.jit(do_not_specialize=COMBINE_RUNTIME_SIZES)
def _combine_moments_kernel(
    partial_ptr,
    coefficients_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    weight_stride,
    bias_stride,
    add_stride_n,
    add_stride_c,
    channels,
    pixels,
    pixels_per_split,
    splits,
    groups,
    channels_per_group,
    elements,
    eps,
    coefficient_stride,
    partial_stride,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per (n, group): its statistics from all partials, and for each channel (centre, scale, shift) with
    z = (x - centre) * scale + shift, rows of `coefficients` (3, N, C)."""
    program = tl.program_id(0).to(tl.int64)
    n = program // groups
    first_channel = program % groups * channels_per_group
    partial = partial_ptr + n * splits * channels + first_channel
    reference = tl.load(partial)
    lane_k = tl.arange(0, BLOCK_K)[:, None].to(tl.int64)
    lane_c = tl.arange(0, BLOCK_C)[None, :]

    drift = 0.0
    for offset in range(0, channels_per_group, BLOCK_C):
        in_group = offset + lane_c < channels_per_group
        add_offsets = n * add_stride_n + (first_channel + offset + lane_c) * add_stride_c
        add = load_channel_values(add_ptr, add_offsets, in_group, 0.0)
        for k in range(0, splits, BLOCK_K):
            mask = (k + lane_k < splits) & in_group
            count = tl.minimum(pixels - (k + lane_k) * pixels_per_split, pixels_per_split).to(tl.float32)
            row = partial + (k + lane_k) * channels + offset + lane_c
            apart = tl.load(row, mask=mask, other=0.0) - reference
            apart += tl.load(row + partial_stride, mask=mask, other=0.0) + add
            drift += tl.sum(tl.sum(tl.where(mask, apart * (count / elements), 0.0), axis=1), axis=0)

    m2 = 0.0
    for offset in range(0, channels_per_group, BLOCK_C):
        in_group = offset + lane_c < channels_per_group
        add_offsets = n * add_stride_n + (first_channel + offset + lane_c) * add_stride_c
        add = load_channel_values(add_ptr, add_offsets, in_group, 0.0)
        for k in range(0, splits, BLOCK_K):
            mask = (k + lane_k < splits) & in_group
            count = tl.minimum(pixels - (k + lane_k) * pixels_per_split, pixels_per_split).to(tl.float32)
            row = partial + (k + lane_k) * channels + offset + lane_c
            apart = tl.load(row, mask=mask, other=0.0) - reference
            apart += tl.load(row + partial_stride, mask=mask, other=0.0) + add - drift
            within = tl.load(row + 2 * partial_stride, mask=mask, other=0.0)
            m2 += tl.sum(tl.sum(tl.where(mask, within + count * apart * apart, 0.0), axis=1), axis=0)

    rstd = 1.0 / tl.sqrt_rn(m2 / elements + eps)
    tl.store(mean_ptr + program, reference + drift)
    tl.store(rstd_ptr + program, rstd)

    lane = tl.arange(0, BLOCK_K)
    for offset in range(0, channels_per_group, BLOCK_K):
        channel = first_channel + offset + lane
        in_group = offset + lane < channels_per_group
        add = load_channel_values(add_ptr, n * add_stride_n + channel * add_stride_c, in_group, 0.0)
        centre, error = two_sum(reference + tl.zeros_like(add), drift - add)
        scale = rstd * load_channel_values(weight_ptr, channel * weight_stride, in_group, 1.0)
        shift = load_channel_values(bias_ptr, channel * bias_stride, in_group, 0.0) - error * scale
        row = coefficients_ptr + n * channels + channel
        tl.store(row, centre, mask=in_group)
        tl.store(row + coefficient_stride, scale, mask=in_group)
        tl.store(row + 2 * coefficient_stride, shift, mask=in_group)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _apply_kernel(
    x_ptr,
    y_ptr,
    coefficients_ptr,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    y_stride_n,
    y_stride_c,
    y_stride_s,
    channels,
    pixels,
    channel_tiles,
    pixel_tiles,
    coefficient_stride,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # From the last tile to the first: the moments kernel has left the end of x in the L2 cache.
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    pixel_tile = program // channel_tiles % pixel_tiles
    n = program // channel_tiles // pixel_tiles
    c = program % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    s = pixel_tile * BLOCK_S + tl.arange(0, BLOCK_S)
    in_channels = c < channels
    mask = in_channels[:, None] & (s < pixels)[None, :]

    row = coefficients_ptr + n * channels + c
    centre = tl.load(row, mask=in_channels, other=0.0)
    scale = tl.load(row + coefficient_stride, mask=in_channels, other=0.0)
    shift = tl.load(row + 2 * coefficient_stride, mask=in_channels, other=0.0)
    x = tl.load(tile_pointers(x_ptr, n, c, s, x_stride_n, x_stride_c, x_stride_s), mask=mask, other=0.0)
    z = (x.to(tl.float32) - centre[:, None]) * scale[:, None] + shift[:, None]
    y_ptrs = tile_pointers(y_ptr, n, c, s, y_stride_n, y_stride_c, y_stride_s)
    tl.store(y_ptrs, activate(z, SILU).to(y_ptr.dtype.element_ty), mask=mask)


def plan_forward(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
    eps: float,
    silu: bool,
    configuration: Configuration | None = None,
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Allocate (y, mean, rstd) and plan the launches that fill them; `meta` tensors will do."""
    problem = Problem.of(x, num_groups)
    configuration = configuration or configuration_for(x.device)
    y = torch.empty_like(x)
    mean = x.new_empty((problem.batch, problem.groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    arguments = {"x_ptr": x, "y_ptr": y, "mean_ptr": mean, "rstd_ptr": rstd, "eps": float(eps)}
    arguments |= problem.arguments() | stride_arguments(x=x, y=y) | channel_arguments(weight, bias, add)

    whole = choose_whole_tile(problem, configuration.max_whole_forward, configuration)
    if whole is not None:
        launches = [plan_whole(_forward_whole_kernel, problem, whole, arguments, silu)]
    else:
        tile = choose_split_tile(problem, configuration.forward_elements_per_thread, configuration)
        launches = _plan_split(problem, tile, arguments, silu, configuration)
    return launches, (y, mean, rstd)


def _plan_split(
    problem: Problem, tile: SplitTile, arguments: Arguments, silu: bool, configuration: Configuration
) -> list[Launch]:
    x = arguments["x_ptr"]
    partial = x.new_empty((3, problem.batch, tile.splits, problem.channels), dtype=torch.float32)
    coefficients = x.new_empty((3, problem.batch, problem.channels), dtype=torch.float32)
    arguments = arguments | tile.arguments()
    arguments |= {"partial_ptr": partial, "partial_stride": partial.stride(0)}
    arguments |= {"coefficients_ptr": coefficients, "coefficient_stride": coefficients.stride(0)}
    blocks = {"BLOCK_C": tile.block_c, "BLOCK_S": tile.block_s}
    return [
        Launch.of(
            _moments_kernel,
            programs=problem.batch * tile.splits * tile.channel_tiles,
            arguments=arguments,
            constexprs=blocks,
            num_warps=tile.num_warps,
        ),
        Launch.of(
            _combine_moments_kernel,
            programs=problem.batch * problem.groups,
            arguments=arguments,
            constexprs=tile.combine_blocks(problem.channels_per_group, configuration),
            num_warps=configuration.combine_warps,
        ),
        Launch.of(
            _apply_kernel,
            programs=problem.batch * tile.pixel_tiles * tile.channel_tiles,
            arguments=arguments,
            constexprs={"SILU": silu} | blocks,
            num_warps=tile.num_warps,
        ),
    ]
