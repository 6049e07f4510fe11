"""GroupNorm + SiLU (with an optional per-channel term added in front) in Triton: kernels, configuration, launch plans.

A tensor is read as (N, C, S) through three strides, so one source serves both layouts: Triton compiles a stride of 1 into the
kernel and from it knows along which dimension loads are contiguous. A tile is always (channels, pixels).

- *whole*: a tile holds whole groups, all pixels. One launch, x is read once.
- *split*: tiles of any channels; one launch for partial statistics per channel, one that combines them per group, one that
  applies them. Channels per group need not fit a power of two, loads stay full lines, and nothing is atomic.

Statistics are two-pass inside a tile and combined after Chan, Golub and LeVeque (1979) across tiles. The design and its reasons
are in docs/kernels.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import Launch, Specialisation, run_all, unique

# ---------------------------------------------------------------------------------------------------------------------
# Device functions
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_channel_values(ptr, offsets, mask, default: tl.constexpr):
    """Per-channel parameter as float32; `default` when the call has no such parameter."""
    if ptr is None:
        values = tl.full(offsets.shape, default, tl.float32)
    else:
        values = tl.load(ptr + offsets, mask=mask, other=default).to(tl.float32)
    return values


@triton.jit
def _activate(z, SILU: tl.constexpr):
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def _activation_gradient(grad_y, z, SILU: tl.constexpr):
    """dL/dz from dL/dy."""
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        grad_y = grad_y * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return grad_y


@triton.jit
def _group_totals(values, slot, BLOCK_G: tl.constexpr):
    """For each channel the total of `values` over its group. slot: the group's place in the tile; >= BLOCK_G: padding.

    Selecting instead of multiplying by 0 and 1 keeps a NaN inside its own group.
    """
    if BLOCK_G == 1:
        totals = tl.sum(tl.where(slot == 0, values, 0.0), axis=0) + tl.zeros_like(values)
    else:
        member = slot[:, None] == tl.arange(0, BLOCK_G)[None, :]
        per_group = tl.sum(tl.where(member, values[:, None], 0.0), axis=0)
        totals = tl.sum(tl.where(member, per_group[None, :], 0.0), axis=1)
    return totals


@triton.jit
def _two_sum(a, b):
    """a + b as the rounded sum and its rounding error, exactly (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@triton.jit
def _tile_pointers(ptr, n, c, s, stride_n, stride_c, stride_s):
    """Addresses of a (channels, pixels) tile; n, c and s are int64, so every product is."""
    return ptr + n * stride_n + c[:, None] * stride_c + s[None, :] * stride_s


# ---------------------------------------------------------------------------------------------------------------------
# Forward kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
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
    channels_per_tile,
    tiles,
    elements,
    eps,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n = program // tiles
    lane = tl.arange(0, BLOCK_C)
    c = (program % tiles) * channels_per_tile + lane
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    in_tile = (lane < channels_per_tile) & (c < channels)
    mask = in_tile[:, None] & (s < pixels)[None, :]
    slot = tl.where(in_tile, lane // channels_per_group, BLOCK_G)

    x = tl.load(_tile_pointers(x_ptr, n, c, s, x_stride_n, x_stride_c, x_stride_s), mask=mask, other=0.0)
    add = _load_channel_values(add_ptr, n * add_stride_n + c * add_stride_c, in_tile, 0.0)
    u = tl.where(mask, x.to(tl.float32) + add[:, None], 0.0)

    # The mean is kept as (mean, drift): subtracting the rounded mean is exact near it, and its own rounding error comes
    # back as the mean of the differences, so |mean| >> std costs no digits.
    mean = _group_totals(tl.sum(u, axis=1), slot, BLOCK_G) / elements
    centred = tl.where(mask, u - mean[:, None], 0.0)
    drift = _group_totals(tl.sum(centred, axis=1), slot, BLOCK_G) / elements
    variance = _group_totals(tl.sum(centred * centred, axis=1), slot, BLOCK_G) / elements - drift * drift
    variance = tl.where(variance < 0.0, 0.0, variance)  # not maximum(): NaN must stay NaN
    rstd = 1.0 / tl.sqrt_rn(variance + eps)

    scale = rstd * _load_channel_values(weight_ptr, c * weight_stride, in_tile, 1.0)
    shift = _load_channel_values(bias_ptr, c * bias_stride, in_tile, 0.0) - drift * scale
    y = _activate(centred * scale[:, None] + shift[:, None], SILU)
    y_ptrs = _tile_pointers(y_ptr, n, c, s, y_stride_n, y_stride_c, y_stride_s)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)

    group = n * groups + c // channels_per_group
    first_of_group = in_tile & (lane % channels_per_group == 0)
    tl.store(mean_ptr + group, mean + drift, mask=first_of_group)
    tl.store(rstd_ptr + group, rstd, mask=first_of_group)


@triton.jit
def _moments_kernel(
    x_ptr,
    partial_mean_ptr,
    partial_m2_ptr,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    channels,
    pixels,
    pixels_per_split,
    splits,
    channel_tiles,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Mean and sum of squared deviations of x, per channel, over one run of pixels. Partials are (N, splits, C)."""
    program = tl.program_id(0).to(tl.int64)
    split = program // channel_tiles % splits
    n = program // channel_tiles // splits
    c = program % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    start = split * pixels_per_split
    stop = tl.minimum(start + pixels_per_split, pixels)
    s = start + tl.arange(0, BLOCK_S)
    in_channels = c < channels

    mask = in_channels[:, None] & (s < stop)[None, :]
    x_ptrs = _tile_pointers(x_ptr, n, c, s, x_stride_n, x_stride_c, x_stride_s)
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    # Differences to the mean of the first tile: small enough to be summed without loss whatever |mean| / std is, and at
    # worst 1 / iterations of the pixels are outliers to the others.
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
    partial = (n * splits + split) * channels + c
    tl.store(partial_mean_ptr + partial, reference + drift, mask=in_channels)
    tl.store(partial_m2_ptr + partial, tl.where(m2 < 0.0, 0.0, m2), mask=in_channels)


@triton.jit
def _combine_moments_kernel(
    partial_mean_ptr,
    partial_m2_ptr,
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
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per (n, group): its statistics from all partials, and for each channel (centre, scale, shift) with
    z = (x - centre) * scale + shift, rows of `coefficients` (3, N, C)."""
    program = tl.program_id(0).to(tl.int64)
    n = program // groups
    first_channel = program % groups * channels_per_group
    partial = n * splits * channels + first_channel
    reference = tl.load(partial_mean_ptr + partial)
    lane_k = tl.arange(0, BLOCK_K)[:, None].to(tl.int64)
    lane_c = tl.arange(0, BLOCK_C)[None, :]

    drift = 0.0
    for c in range(0, channels_per_group, BLOCK_C):
        in_group = c + lane_c < channels_per_group
        add_offsets = n * add_stride_n + (first_channel + c + lane_c) * add_stride_c
        add = _load_channel_values(add_ptr, add_offsets, in_group, 0.0)
        for k in range(0, splits, BLOCK_K):
            mask = (k + lane_k < splits) & in_group
            count = tl.minimum(pixels - (k + lane_k) * pixels_per_split, pixels_per_split).to(tl.float32)
            means = tl.load(partial_mean_ptr + partial + (k + lane_k) * channels + c + lane_c, mask=mask, other=0.0)
            drift += tl.sum(tl.sum(tl.where(mask, (means - reference + add) * (count / elements), 0.0), axis=1), axis=0)

    m2 = 0.0
    for c in range(0, channels_per_group, BLOCK_C):
        in_group = c + lane_c < channels_per_group
        add_offsets = n * add_stride_n + (first_channel + c + lane_c) * add_stride_c
        add = _load_channel_values(add_ptr, add_offsets, in_group, 0.0)
        for k in range(0, splits, BLOCK_K):
            mask = (k + lane_k < splits) & in_group
            count = tl.minimum(pixels - (k + lane_k) * pixels_per_split, pixels_per_split).to(tl.float32)
            offsets = partial + (k + lane_k) * channels + c + lane_c
            between = tl.load(partial_mean_ptr + offsets, mask=mask, other=0.0) - reference + add - drift
            within = tl.load(partial_m2_ptr + offsets, mask=mask, other=0.0)
            m2 += tl.sum(tl.sum(tl.where(mask, within + count * between * between, 0.0), axis=1), axis=0)

    rstd = 1.0 / tl.sqrt_rn(m2 / elements + eps)
    tl.store(mean_ptr + program, reference + drift)
    tl.store(rstd_ptr + program, rstd)

    lane = tl.arange(0, BLOCK_K)
    for offset in range(0, channels_per_group, BLOCK_K):
        c = first_channel + offset + lane
        in_group = offset + lane < channels_per_group
        add = _load_channel_values(add_ptr, n * add_stride_n + c * add_stride_c, in_group, 0.0)
        centre, error = _two_sum(reference + tl.zeros_like(add), drift - add)
        scale = rstd * _load_channel_values(weight_ptr, c * weight_stride, in_group, 1.0)
        shift = _load_channel_values(bias_ptr, c * bias_stride, in_group, 0.0) - error * scale
        row = coefficients_ptr + n * channels + c
        tl.store(row, centre, mask=in_group)
        tl.store(row + coefficient_stride, scale, mask=in_group)
        tl.store(row + 2 * coefficient_stride, shift, mask=in_group)


@triton.jit
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
    x = tl.load(_tile_pointers(x_ptr, n, c, s, x_stride_n, x_stride_c, x_stride_s), mask=mask, other=0.0)
    z = (x.to(tl.float32) - centre[:, None]) * scale[:, None] + shift[:, None]
    y_ptrs = _tile_pointers(y_ptr, n, c, s, y_stride_n, y_stride_c, y_stride_s)
    tl.store(y_ptrs, _activate(z, SILU).to(y_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Backward kernels. dz = grad_y * silu'(z), xhat = (u - mean) * rstd, and over a group of D elements
#   grad_x = rstd * (weight * dz - mean_D(weight * dz) - xhat * mean_D(weight * dz * xhat)).
# Three sums per channel are enough for everything else: of dz (grad_bias), of dz * xhat (grad_weight) and of xhat, which
# together give grad_add = sum of grad_x over the pixels in float32, without a second look at grad_x.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
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
    channels_per_tile,
    tiles,
    elements,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n = program // tiles
    lane = tl.arange(0, BLOCK_C)
    c = (program % tiles) * channels_per_tile + lane
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    in_tile = (lane < channels_per_tile) & (c < channels)
    mask = in_tile[:, None] & (s < pixels)[None, :]
    slot = tl.where(in_tile, lane // channels_per_group, BLOCK_G)

    group = n * groups + c // channels_per_group
    mean = tl.load(mean_ptr + group, mask=in_tile, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=in_tile, other=0.0)
    weight = _load_channel_values(weight_ptr, c * weight_stride, in_tile, 1.0)
    bias = _load_channel_values(bias_ptr, c * bias_stride, in_tile, 0.0)
    add = _load_channel_values(add_ptr, n * add_stride_n + c * add_stride_c, in_tile, 0.0)

    x = tl.load(_tile_pointers(x_ptr, n, c, s, x_stride_n, x_stride_c, x_stride_s), mask=mask, other=0.0)
    grad_y_ptrs = _tile_pointers(grad_y_ptr, n, c, s, grad_y_stride_n, grad_y_stride_c, grad_y_stride_s)
    grad_y = tl.load(grad_y_ptrs, mask=mask, other=0.0).to(tl.float32)
    xhat = tl.where(mask, ((x.to(tl.float32) + add[:, None]) - mean[:, None]) * rstd[:, None], 0.0)
    dz = tl.where(mask, _activation_gradient(grad_y, xhat * weight[:, None] + bias[:, None], SILU), 0.0)

    sum_dz = tl.sum(dz, axis=1)
    sum_dz_xhat = tl.sum(dz * xhat, axis=1)
    sum_xhat = tl.sum(xhat, axis=1)
    mean_dz = _group_totals(weight * sum_dz, slot, BLOCK_G) / elements
    mean_dz_xhat = _group_totals(weight * sum_dz_xhat, slot, BLOCK_G) / elements
    grad_x = rstd[:, None] * (weight[:, None] * dz - mean_dz[:, None] - xhat * mean_dz_xhat[:, None])
    grad_x_ptrs = _tile_pointers(grad_x_ptr, n, c, s, grad_x_stride_n, grad_x_stride_c, grad_x_stride_s)
    tl.store(grad_x_ptrs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)

    channel = n * channels + c
    tl.store(sum_dz_ptr + channel, sum_dz, mask=in_tile)
    tl.store(sum_dz_xhat_ptr + channel, sum_dz_xhat, mask=in_tile)
    grad_add = rstd * (weight * sum_dz - pixels * mean_dz - sum_xhat * mean_dz_xhat)
    tl.store(grad_add_ptr + channel, grad_add, mask=in_tile)


@triton.jit
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
    mean = tl.load(mean_ptr + group, mask=in_channels, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=in_channels, other=0.0)
    weight = _load_channel_values(weight_ptr, c * weight_stride, in_channels, 1.0)
    bias = _load_channel_values(bias_ptr, c * bias_stride, in_channels, 0.0)
    add = _load_channel_values(add_ptr, n * add_stride_n + c * add_stride_c, in_channels, 0.0)

    x_ptrs = _tile_pointers(x_ptr, n, c, s, x_stride_n, x_stride_c, x_stride_s)
    grad_y_ptrs = _tile_pointers(grad_y_ptr, n, c, s, grad_y_stride_n, grad_y_stride_c, grad_y_stride_s)
    sum_dz = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    sum_dz_xhat = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    sum_xhat = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for offset in range(0, stop - start, BLOCK_S):
        mask = in_channels[:, None] & (s + offset < stop)[None, :]
        x = tl.load(x_ptrs + offset * x_stride_s, mask=mask, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptrs + offset * grad_y_stride_s, mask=mask, other=0.0).to(tl.float32)
        xhat = tl.where(mask, ((x + add[:, None]) - mean[:, None]) * rstd[:, None], 0.0)
        dz = tl.where(mask, _activation_gradient(grad_y, xhat * weight[:, None] + bias[:, None], SILU), 0.0)
        sum_dz += dz
        sum_dz_xhat += dz * xhat
        sum_xhat += xhat

    row = partial_ptr + (n * splits + split) * channels + c
    tl.store(row, tl.sum(sum_dz, axis=1), mask=in_channels)
    tl.store(row + partial_stride, tl.sum(sum_dz_xhat, axis=1), mask=in_channels)
    tl.store(row + 2 * partial_stride, tl.sum(sum_xhat, axis=1), mask=in_channels)


@triton.jit
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
        weight = _load_channel_values(weight_ptr, c * weight_stride, in_channels, 1.0)
        mean_dz += tl.where(in_channels, weight * sum_dz, 0.0)
        mean_dz_xhat += tl.where(in_channels, weight * sum_dz_xhat, 0.0)
    tl.store(mean_dz_ptr + program, tl.sum(mean_dz, axis=0) / elements)
    tl.store(mean_dz_xhat_ptr + program, tl.sum(mean_dz_xhat, axis=0) / elements)


@triton.jit
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
    mean = tl.load(mean_ptr + group, mask=in_channels, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=in_channels, other=0.0)
    mean_dz = tl.load(mean_dz_ptr + group, mask=in_channels, other=0.0)
    mean_dz_xhat = tl.load(mean_dz_xhat_ptr + group, mask=in_channels, other=0.0)
    weight = _load_channel_values(weight_ptr, c * weight_stride, in_channels, 1.0)
    bias = _load_channel_values(bias_ptr, c * bias_stride, in_channels, 0.0)
    add = _load_channel_values(add_ptr, n * add_stride_n + c * add_stride_c, in_channels, 0.0)

    x = tl.load(_tile_pointers(x_ptr, n, c, s, x_stride_n, x_stride_c, x_stride_s), mask=mask, other=0.0)
    grad_y_ptrs = _tile_pointers(grad_y_ptr, n, c, s, grad_y_stride_n, grad_y_stride_c, grad_y_stride_s)
    grad_y = tl.load(grad_y_ptrs, mask=mask, other=0.0).to(tl.float32)
    xhat = ((x.to(tl.float32) + add[:, None]) - mean[:, None]) * rstd[:, None]
    dz = _activation_gradient(grad_y, xhat * weight[:, None] + bias[:, None], SILU)
    grad_x = rstd[:, None] * (weight[:, None] * dz - mean_dz[:, None] - xhat * mean_dz_xhat[:, None])
    grad_x_ptrs = _tile_pointers(grad_x_ptr, n, c, s, grad_x_stride_n, grad_x_stride_c, grad_x_stride_s)
    tl.store(grad_x_ptrs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)

    if pixel_tile == 0:
        channel = n * channels + c
        sum_dz = tl.load(sum_dz_ptr + channel, mask=in_channels, other=0.0)
        sum_xhat = tl.load(sum_xhat_ptr + channel, mask=in_channels, other=0.0)
        grad_add = rstd * (weight * sum_dz - pixels * mean_dz - sum_xhat * mean_dz_xhat)
        tl.store(grad_add_ptr + channel, grad_add, mask=in_channels)


@triton.jit
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


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: which regime, which tiles. It depends on shapes, strides and dtypes alone, never on the device, so that the same
# call gives the same bits on every GPU of one architecture.
# ---------------------------------------------------------------------------------------------------------------------

# Elements of a tile that stays in registers: 16 warps of 32 (forward) or 16 (backward, two inputs) elements per thread. Twice
# as much still compiles without spills for sm_90 but leaves one program per multiprocessor.
MAX_WHOLE_FORWARD = 16384
MAX_WHOLE_BACKWARD = 8192
SPLIT_TILE = 4096  # 8 warps x 32 threads x 16 elements: two 16-byte loads per thread in 16 bit
SPLIT_WARPS = 8
SECTOR_CHANNELS = 16  # channels in a 32-byte sector of a 16-bit tensor
LINE_CHANNELS = 64  # channels in a 128-byte line of a 16-bit tensor
MAX_GROUPS_PER_TILE = 16  # bounds the (channels, groups) table of _group_totals
PROGRAMS_PER_WAVE = 1024  # about eight programs on each of 132 multiprocessors
MAX_TILES_PER_PROGRAM = 16  # beyond it the partials are already under 1 % of the traffic
COMBINE_BLOCK = {"BLOCK_K": 128, "BLOCK_C": 16}  # partials x channels per step of a combine kernel; one version for all
COMBINE_WARPS = 4
BATCH_BLOCK = {"BLOCK_N": 32, "BLOCK_C": 32}


@dataclass(frozen=True)
class Problem:
    """What the configuration depends on: x read as (N, C, S) with `groups` groups."""

    batch: int
    channels: int
    pixels: int
    groups: int
    channels_last: bool

    @property
    def channels_per_group(self) -> int:
        return self.channels // self.groups

    @property
    def elements(self) -> int:
        """Elements in one group of one image."""
        return self.channels_per_group * self.pixels


@dataclass(frozen=True)
class WholeTile:
    """`groups_per_tile` whole groups and all pixels per program."""

    groups_per_tile: int
    block_c: int
    block_s: int
    num_warps: int

    @property
    def block_g(self) -> int:
        return triton.next_power_of_2(self.groups_per_tile)


@dataclass(frozen=True)
class SplitTile:
    """Tiles of (block_c, block_s); a program of a statistics kernel walks `tiles_per_program` of them along the pixels."""

    block_c: int
    block_s: int
    tiles_per_program: int


def choose_whole_tile(problem: Problem, max_elements: int) -> WholeTile | None:
    """The tile of the one-launch regime, or None when no whole group fits into `max_elements`."""
    block_s = triton.next_power_of_2(problem.pixels)

    def block_c(groups: int) -> int:
        return triton.next_power_of_2(groups * problem.channels_per_group)

    if problem.channels_last:
        # A row of a tile should be whole 32-byte sectors: lcm(16, C/G) channels. It need not be when that is too large.
        groups = math.lcm(SECTOR_CHANNELS, problem.channels_per_group) // problem.channels_per_group
    else:
        # A group is one run of memory. Tiny ones share a program so that a warp has a load's worth to do.
        groups = max(1, 512 // problem.elements)
    groups = min(groups, problem.groups, MAX_GROUPS_PER_TILE)
    while groups > 1 and block_c(groups) * block_s > max_elements:
        groups //= 2
    elements = block_c(groups) * block_s
    row_too_short = problem.channels_last and problem.pixels > 1 and groups * problem.channels_per_group < min(
        SECTOR_CHANNELS // 2, problem.channels
    )
    if elements > max_elements or row_too_short:
        return None
    num_warps = min(16, max(1, elements // 512))  # 16 elements per thread while that is possible
    return WholeTile(groups, block_c(groups), block_s, num_warps)


def choose_split_tile(problem: Problem, same_layout: bool) -> SplitTile:
    """The tile of the split regime. `same_layout`: every input is contiguous along the same dimension."""
    limit_c, limit_s = triton.next_power_of_2(problem.channels), triton.next_power_of_2(problem.pixels)
    if problem.channels_last or not same_layout:
        # Full lines along the channels; and when a gradient arrives in the other layout, full lines along the pixels too.
        block_c = min(limit_c, max(LINE_CHANNELS, SPLIT_TILE // limit_s))
        block_s = min(limit_s, SPLIT_TILE // block_c)
    else:
        block_s = min(limit_s, max(SPLIT_TILE // 4, SPLIT_TILE // limit_c))
        block_c = min(limit_c, SPLIT_TILE // block_s)
    tiles = problem.batch * triton.cdiv(problem.channels, block_c) * triton.cdiv(problem.pixels, block_s)
    return SplitTile(block_c, block_s, min(MAX_TILES_PER_PROGRAM, max(1, tiles // PROGRAMS_PER_WAVE)))
