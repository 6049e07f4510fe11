"""Backward kernels of GroupNorm + SiLU and the plan of their launches.

With u = x + add, xhat = (u - mean) * rstd, z = xhat * weight + bias, dz = grad_y * silu'(z), and D elements in a
group,

    grad_x = rstd * (weight * dz - sum_D(weight * dz) / D - xhat * sum_D(weight * dz * xhat) / D).

Three sums over the pixels of a channel are enough for everything else: of dz (grad_bias), of dz * xhat (grad_weight)
and of xhat. Together they give grad_add, the sum of grad_x over the pixels, in float32 and without a second look at
grad_x. The regimes are those of forward.py; one more launch adds up the gradients of weight and bias over the batch.
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
    activation_gradient,
    group_totals,
    load_channel_values,
    tile_pointers,
)
from .plan import Arguments, channel_arguments, plan_whole, stride_arguments
from .tiles import Problem, SplitTile, choose_split_tile, choose_whole_tile


@triton.jit
def _load_channels(
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    weight_stride,
    bias_stride,
    add_stride_n,
    add_stride_c,
    n,
    c,
    group,
    mask,
):
    """mean, rstd, weight, bias and add of each channel, float32."""
    mean = tl.load(mean_ptr + group, mask=mask, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=mask, other=0.0)
    weight = load_channel_values(weight_ptr, c * weight_stride, mask, 1.0)
    bias = load_channel_values(bias_ptr, c * bias_stride, mask, 0.0)
    add = load_channel_values(add_ptr, n * add_stride_n + c * add_stride_c, mask, 0.0)
    return mean, rstd, weight, bias, add


@triton.jit
def _xhat_and_dz(x, grad_y, mean, rstd, weight, bias, add, SILU: tl.constexpr):
    xhat = ((x.to(tl.float32) + add[:, None]) - mean[:, None]) * rstd[:, None]
    dz = activation_gradient(grad_y.to(tl.float32), xhat * weight[:, None] + bias[:, None], SILU)
    return xhat, dz


@triton.jit
def _grad_x(xhat, dz, rstd, weight, mean_dz, mean_dz_xhat):
    return rstd[:, None] * (weight[:, None] * dz - mean_dz[:, None] - xhat * mean_dz_xhat[:, None])


@triton.jit
def _grad_add(pixels, sum_dz, sum_xhat, rstd, weight, mean_dz, mean_dz_xhat):
    """_grad_x summed over the pixels of a channel."""
    return rstd * (weight * sum_dz - pixels * mean_dz - sum_xhat * mean_dz_xhat)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _backward_whole_kernel(
    grad_y_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    grad_x_ptr,
    sum_dz_xhat_ptr,
    sum_dz_ptr,
    grad_add_ptr,
    grad_y_stride_n,
    grad_y_stride_c,
    grad_y_stride_s,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    grad_x_stride_n,
    grad_x_stride_c,
    grad_x_stride_s,
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

    group = n * groups + c // channels_per_group
    mean, rstd, weight, bias, add = _load_channels(
        mean_ptr,
        rstd_ptr,
        weight_ptr,
        bias_ptr,
        add_ptr,
        weight_stride,
        bias_stride,
        add_stride_n,
        add_stride_c,
        n,
        c,
        group,
        in_tile,
    )

    x = tl.load(tile_pointers(x_ptr, n, c, s, x_stride_n, x_stride_c, x_stride_s), mask=mask, other=0.0)
    grad_y_ptrs = tile_pointers(grad_y_ptr, n, c, s, grad_y_stride_n, grad_y_stride_c, grad_y_stride_s)
    grad_y = tl.load(grad_y_ptrs, mask=mask, other=0.0)
    xhat, dz = _xhat_and_dz(x, grad_y, mean, rstd, weight, bias, add, SILU)
    xhat, dz = tl.where(mask, xhat, 0.0), tl.where(mask, dz, 0.0)

    sum_dz = tl.sum(dz, axis=1)
    sum_dz_xhat = tl.sum(dz * xhat, axis=1)
    sum_xhat = tl.sum(xhat, axis=1)
    mean_dz = group_totals(weight * sum_dz, slot, BLOCK_G) / elements
    mean_dz_xhat = group_totals(weight * sum_dz_xhat, slot, BLOCK_G) / elements
    grad_x = _grad_x(xhat, dz, rstd, weight, mean_dz, mean_dz_xhat)
    grad_x_ptrs = tile_pointers(grad_x_ptr, n, c, s, grad_x_stride_n, grad_x_stride_c, grad_x_stride_s)
    tl.store(grad_x_ptrs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)

    channel = n * channels + c
    tl.store(sum_dz_ptr + channel, sum_dz, mask=in_tile)
    tl.store(sum_dz_xhat_ptr + channel, sum_dz_xhat, mask=in_tile)
    grad_add = _grad_add(pixels, sum_dz, sum_xhat, rstd, weight, mean_dz, mean_dz_xhat)
    tl.store(grad_add_ptr + channel, grad_add, mask=in_tile)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _gradient_sums_kernel(
    grad_y_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    partial_ptr,
    grad_y_stride_n,
    grad_y_stride_c,
    grad_y_stride_s,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    weight_stride,
    bias_stride,
    add_stride_n,
    add_stride_c,
    channels,
    pixels,
    groups,
    channels_per_group,
    pixels_per_split,
    splits,
    channel_tiles,
    partial_stride,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sums of dz, dz * xhat and xhat, per channel, over one run of pixels. `partial` is (3, N, splits, C)."""
    program = tl.program_id(0).to(tl.int64)
    split = program // channel_tiles % splits
    n = program // channel_tiles // splits
    c = program % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    start = split * pixels_per_split
    stop = tl.minimum(start + pixels_per_split, pixels)
    s = start + tl.arange(0, BLOCK_S)
    in_channels = c < channels

    group = n * groups + c // channels_per_group
    mean, rstd, weight, bias, add = _load_channels(
        mean_ptr,
        rstd_ptr,
        weight_ptr,
        bias_ptr,
        add_ptr,
        weight_stride,
        bias_stride,
        add_stride_n,
        add_stride_c,
        n,
        c,
        group,
        in_channels,
    )

    x_ptrs = tile_pointers(x_ptr, n, c, s, x_stride_n, x_stride_c, x_stride_s)
    grad_y_ptrs = tile_pointers(grad_y_ptr, n, c, s, grad_y_stride_n, grad_y_stride_c, grad_y_stride_s)
    sum_dz = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    sum_dz_xhat = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    sum_xhat = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for offset in range(0, stop - start, BLOCK_S):
        mask = in_channels[:, None] & (s + offset < stop)[None, :]
        x = tl.load(x_ptrs + offset * x_stride_s, mask=mask, other=0.0)
        grad_y = tl.load(grad_y_ptrs + offset * grad_y_stride_s, mask=mask, other=0.0)
        xhat, dz = _xhat_and_dz(x, grad_y, mean, rstd, weight, bias, add, SILU)
        xhat, dz = tl.where(mask, xhat, 0.0), tl.where(mask, dz, 0.0)
        sum_dz += dz
        sum_dz_xhat += dz * xhat
        sum_xhat += xhat

    row = partial_ptr + (n * splits + split) * channels + c
    tl.store(row, tl.sum(sum_dz, axis=1), mask=in_channels)
    tl.store(row + partial_stride, tl.sum(sum_dz_xhat, axis=1), mask=in_channels)
    tl.store(row + 2 * partial_stride, tl.sum(sum_xhat, axis=1), mask=in_channels)


@triton.jit(do_not_specialize=COMBINE_RUNTIME_SIZES)
def _combine_gradient_sums_kernel(
    partial_ptr,
    weight_ptr,
    sum_dz_xhat_ptr,
    sum_dz_ptr,
    sum_xhat_ptr,
    mean_dz_ptr,
    mean_dz_xhat_ptr,
    weight_stride,
    channels,
    splits,
    groups,
    channels_per_group,
    elements,
    partial_stride,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per (n, group): the partials of each channel added up, and the two means of the group."""
    program = tl.program_id(0).to(tl.int64)
    n = program // groups
    first_channel = program % groups * channels_per_group
    lane_k = tl.arange(0, BLOCK_K)[:, None].to(tl.int64)
    lane_c = tl.arange(0, BLOCK_C)[None, :]
    mean_dz = tl.zeros((BLOCK_C,), tl.float32)
    mean_dz_xhat = tl.zeros((BLOCK_C,), tl.float32)
    for offset in range(0, channels_per_group, BLOCK_C):
        in_group = offset + lane_c < channels_per_group
        dz = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        dz_xhat = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        xhat = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        for k in range(0, splits, BLOCK_K):
            mask = (k + lane_k < splits) & in_group
            row = partial_ptr + (n * splits + k + lane_k) * channels + first_channel + offset + lane_c
            dz += tl.load(row, mask=mask, other=0.0)
            dz_xhat += tl.load(row + partial_stride, mask=mask, other=0.0)
            xhat += tl.load(row + 2 * partial_stride, mask=mask, other=0.0)
        in_channels = offset + tl.arange(0, BLOCK_C) < channels_per_group
        c = first_channel + offset + tl.arange(0, BLOCK_C)
        sum_dz = tl.sum(dz, axis=0)
        sum_dz_xhat = tl.sum(dz_xhat, axis=0)
        tl.store(sum_dz_ptr + n * channels + c, sum_dz, mask=in_channels)
        tl.store(sum_dz_xhat_ptr + n * channels + c, sum_dz_xhat, mask=in_channels)
        tl.store(sum_xhat_ptr + n * channels + c, tl.sum(xhat, axis=0), mask=in_channels)
        weight = load_channel_values(weight_ptr, c * weight_stride, in_channels, 1.0)
        mean_dz += tl.where(in_channels, weight * sum_dz, 0.0)
        mean_dz_xhat += tl.where(in_channels, weight * sum_dz_xhat, 0.0)
    tl.store(mean_dz_ptr + program, tl.sum(mean_dz, axis=0) / elements)
    tl.store(mean_dz_xhat_ptr + program, tl.sum(mean_dz_xhat, axis=0) / elements)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _apply_gradient_kernel(
    grad_y_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    sum_dz_ptr,
    sum_xhat_ptr,
    mean_dz_ptr,
    mean_dz_xhat_ptr,
    grad_x_ptr,
    grad_add_ptr,
    grad_y_stride_n,
    grad_y_stride_c,
    grad_y_stride_s,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    grad_x_stride_n,
    grad_x_stride_c,
    grad_x_stride_s,
    weight_stride,
    bias_stride,
    add_stride_n,
    add_stride_c,
    channels,
    pixels,
    groups,
    channels_per_group,
    channel_tiles,
    pixel_tiles,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """grad_x tile by tile; the programs of the first pixel tile also write grad_add of their channels."""
    # From the last tile to the first, as in _apply_kernel.
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    pixel_tile = program // channel_tiles % pixel_tiles
    n = program // channel_tiles // pixel_tiles
    c = program % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    s = pixel_tile * BLOCK_S + tl.arange(0, BLOCK_S)
    in_channels = c < channels
    mask = in_channels[:, None] & (s < pixels)[None, :]

    group = n * groups + c // channels_per_group
    mean, rstd, weight, bias, add = _load_channels(
        mean_ptr,
        rstd_ptr,
        weight_ptr,
        bias_ptr,
        add_ptr,
        weight_stride,
        bias_stride,
        add_stride_n,
        add_stride_c,
        n,
        c,
        group,
        in_channels,
    )
    mean_dz = tl.load(mean_dz_ptr + group, mask=in_channels, other=0.0)
    mean_dz_xhat = tl.load(mean_dz_xhat_ptr + group, mask=in_channels, other=0.0)

    x = tl.load(tile_pointers(x_ptr, n, c, s, x_stride_n, x_stride_c, x_stride_s), mask=mask, other=0.0)
    grad_y_ptrs = tile_pointers(grad_y_ptr, n, c, s, grad_y_stride_n, grad_y_stride_c, grad_y_stride_s)
    grad_y = tl.load(grad_y_ptrs, mask=mask, other=0.0)
    xhat, dz = _xhat_and_dz(x, grad_y, mean, rstd, weight, bias, add, SILU)
    grad_x = _grad_x(xhat, dz, rstd, weight, mean_dz, mean_dz_xhat)
    grad_x_ptrs = tile_pointers(grad_x_ptr, n, c, s, grad_x_stride_n, grad_x_stride_c, grad_x_stride_s)
    tl.store(grad_x_ptrs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)

    if pixel_tile == 0:
        channel = n * channels + c
        sum_dz = tl.load(sum_dz_ptr + channel, mask=in_channels, other=0.0)
        sum_xhat = tl.load(sum_xhat_ptr + channel, mask=in_channels, other=0.0)
        grad_add = _grad_add(pixels, sum_dz, sum_xhat, rstd, weight, mean_dz, mean_dz_xhat)
        tl.store(grad_add_ptr + channel, grad_add, mask=in_channels)


@triton.jit(do_not_specialize=COMBINE_RUNTIME_SIZES)
def _sum_over_batch_kernel(
    sum_dz_xhat_ptr,
    sum_dz_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    batch,
    channels,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    lane_n = tl.arange(0, BLOCK_N)[:, None]
    grad_weight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    grad_bias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for n in range(0, batch, BLOCK_N):
        mask = (n + lane_n < batch) & (c < channels)
        offsets = (n + lane_n) * channels + c
        grad_weight += tl.load(sum_dz_xhat_ptr + offsets, mask=mask, other=0.0)
        grad_bias += tl.load(sum_dz_ptr + offsets, mask=mask, other=0.0)
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(grad_weight_ptr + c, tl.sum(grad_weight, axis=0), mask=c < channels)
    tl.store(grad_bias_ptr + c, tl.sum(grad_bias, axis=0), mask=c < channels)


BATCH_BLOCK = {"BLOCK_N": 32, "BLOCK_C": 32}


def plan_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
    configuration: Configuration | None = None,
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Allocate (grad_x, grad_weight, grad_bias, grad_add) and plan the launches that fill them; `meta` tensors will
    do."""
    problem = Problem.of(x, num_groups)
    configuration = configuration or configuration_for(x.device)
    grad_x = torch.empty_like(x)
    grad_add = x.new_empty((problem.batch, problem.channels), dtype=torch.float32)
    sum_dz_xhat, sum_dz = torch.empty_like(grad_add), torch.empty_like(grad_add)
    arguments = {"grad_y_ptr": grad_y, "x_ptr": x, "mean_ptr": mean, "rstd_ptr": rstd}
    arguments |= {"grad_x_ptr": grad_x, "grad_add_ptr": grad_add}
    arguments |= {"sum_dz_xhat_ptr": sum_dz_xhat, "sum_dz_ptr": sum_dz}
    arguments |= problem.arguments() | stride_arguments(grad_y=grad_y, x=x, grad_x=grad_x)
    arguments |= channel_arguments(weight, bias, add)

    whole = choose_whole_tile(problem, configuration.max_whole_backward, configuration)
    if whole is not None:
        launches = [plan_whole(_backward_whole_kernel, problem, whole, arguments, silu)]
    else:
        gradient_unit = "grad_y_stride_s" if problem.channels_last else "grad_y_stride_c"
        mixed_layouts = arguments[gradient_unit] == 1
        tile = choose_split_tile(problem, configuration.backward_elements_per_thread, configuration, mixed_layouts)
        launches = _plan_split(problem, tile, arguments, silu, configuration)

    if problem.batch == 1:  # the sums over the pixels already are the gradients
        return launches, (grad_x, sum_dz_xhat.view(-1), sum_dz.view(-1), grad_add)
    grad_weight = x.new_empty((problem.channels,), dtype=torch.float32)
    grad_bias = torch.empty_like(grad_weight)
    sum_over_batch = Launch.of(
        _sum_over_batch_kernel,
        programs=triton.cdiv(problem.channels, BATCH_BLOCK["BLOCK_C"]),
        arguments=arguments | {"grad_weight_ptr": grad_weight, "grad_bias_ptr": grad_bias},
        constexprs=BATCH_BLOCK,
        num_warps=configuration.combine_warps,
    )
    return [*launches, sum_over_batch], (grad_x, grad_weight, grad_bias, grad_add)


def _plan_split(
    problem: Problem, tile: SplitTile, arguments: Arguments, silu: bool, configuration: Configuration
) -> list[Launch]:
    x = arguments["x_ptr"]
    partial = x.new_empty((3, problem.batch, tile.splits, problem.channels), dtype=torch.float32)
    sum_xhat = x.new_empty((problem.batch, problem.channels), dtype=torch.float32)
    mean_dz = x.new_empty((problem.batch, problem.groups), dtype=torch.float32)
    arguments = arguments | tile.arguments()
    arguments |= {"partial_ptr": partial, "partial_stride": partial.stride(0), "sum_xhat_ptr": sum_xhat}
    arguments |= {"mean_dz_ptr": mean_dz, "mean_dz_xhat_ptr": torch.empty_like(mean_dz)}
    blocks = {"SILU": silu, "BLOCK_C": tile.block_c, "BLOCK_S": tile.block_s}
    return [
        Launch.of(
            _gradient_sums_kernel,
            programs=problem.batch * tile.splits * tile.channel_tiles,
            arguments=arguments,
            constexprs=blocks,
            num_warps=tile.num_warps,
        ),
        Launch.of(
            _combine_gradient_sums_kernel,
            programs=problem.batch * problem.groups,
            arguments=arguments,
            constexprs=tile.combine_blocks(problem.channels_per_group, configuration),
            num_warps=configuration.combine_warps,
        ),
        Launch.of(
            _apply_gradient_kernel,
            programs=problem.batch * tile.pixel_tiles * tile.channel_tiles,
            arguments=arguments,
            constexprs=blocks,
            num_warps=tile.num_warps,
        ),
    ]
