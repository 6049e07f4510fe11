"""Forward kernels of LayerNorm and the plan of their launches.

*Whole*: a program holds its rows in registers and reads them once. *Blocks*: a longer row is read twice, in blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Launch
from .tiles import BLOCK, BLOCK_WARPS, MAX_WHOLE_FORWARD, choose_tile, row_stride


@triton.jit
def load_parameter(ptr, c, stride, mask, default: tl.constexpr):
    """Values per column as float32; `default` when the call has no such parameter."""
    if ptr is None:
        values = tl.full(c.shape, default, tl.float32)
    else:
        values = tl.load(ptr + c * stride, mask=mask, other=default).to(tl.float32)
    return values


@triton.jit
def _load_sum(x_ptr, residual_ptr, s_ptr, r, c, x_stride, residual_stride, columns, mask):
    """x, or x + residual: rounded, written to s and then used as rounded."""
    x = tl.load(x_ptr + r * x_stride + c, mask=mask, other=0.0)
    u = x.to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + r * residual_stride + c, mask=mask, other=0.0)
        s = (u + residual.to(tl.float32)).to(x.dtype)
        tl.store(s_ptr + r * columns + c, s, mask=mask)
        u = s.to(tl.float32)
    return u


@triton.jit
def _store_normalised(
    y_ptr, centred, drift, rstd, weight_ptr, bias_ptr, weight_stride, bias_stride, r, c, columns, in_row, mask
):
    weight = load_parameter(weight_ptr, c, weight_stride, in_row, 1.0)
    bias = load_parameter(bias_ptr, c, bias_stride, in_row, 0.0)
    y = (centred - drift) * rstd * weight + bias
    tl.store(y_ptr + r * columns + c, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _forward_whole_kernel(
    x_ptr,
    residual_ptr,
    s_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    x_stride,
    residual_stride,
    weight_stride,
    bias_stride,
    rows,
    columns,
    eps,
    BLOCK_R: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    row = first_row + tl.arange(0, BLOCK_R)
    in_rows = row < rows
    r = row[:, None]

    c = tl.arange(0, HEAD)[None, :]
    in_row = c < columns
    mask = in_rows[:, None] & in_row
    u = _load_sum(x_ptr, residual_ptr, s_ptr, r, c, x_stride, residual_stride, columns, mask)
    total = tl.sum(u, axis=1)
    if TAIL > 0:
        c_tail = HEAD + tl.arange(0, TAIL)[None, :]
        in_tail = c_tail < columns
        mask_tail = in_rows[:, None] & in_tail
        u_tail = _load_sum(x_ptr, residual_ptr, s_ptr, r, c_tail, x_stride, residual_stride, columns, mask_tail)
        total += tl.sum(u_tail, axis=1)

    # The mean is kept as (mean, drift): subtracting the rounded mean is exact near it, and its own rounding error
    # comes back as the mean of the differences, so |mean| >> std costs no digits.
    mean = total / columns
    centred = tl.where(mask, u - mean[:, None], 0.0)
    drift = tl.sum(centred, axis=1)
    m2 = tl.sum(centred * centred, axis=1)
    if TAIL > 0:
        centred_tail = tl.where(mask_tail, u_tail - mean[:, None], 0.0)
        drift += tl.sum(centred_tail, axis=1)
        m2 += tl.sum(centred_tail * centred_tail, axis=1)
    drift = drift / columns
    variance = m2 / columns - drift * drift
    variance = tl.where(variance < 0.0, 0.0, variance)  # not maximum(): NaN must stay NaN
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    tl.store(mean_ptr + row, mean + drift, mask=in_rows)
    tl.store(rstd_ptr + row, rstd, mask=in_rows)

    drift, rstd = drift[:, None], rstd[:, None]
    _store_normalised(
        y_ptr, centred, drift, rstd, weight_ptr, bias_ptr, weight_stride, bias_stride, r, c, columns, in_row, mask
    )
    if TAIL > 0:
        _store_normalised(
            y_ptr,
            centred_tail,
            drift,
            rstd,
            weight_ptr,
            bias_ptr,
            weight_stride,
            bias_stride,
            r,
            c_tail,
            columns,
            in_tail,
            mask_tail,
        )


@triton.jit
def _forward_blocks_kernel(
    x_ptr,
    residual_ptr,
    s_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    x_stride,
    residual_stride,
    weight_stride,
    bias_stride,
    columns,
    eps,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)

    # Differences to the mean of the first block are small enough to be summed without loss, whatever |mean| / std is.
    # Should that block lie far from the others, it makes the variance large as well.
    mask = lane < columns
    u = _load_sum(x_ptr, residual_ptr, s_ptr, row, lane, x_stride, residual_stride, columns, mask)
    reference = tl.sum(u, axis=0) / tl.minimum(columns, BLOCK_C)
    first_moment = tl.where(mask, u - reference, 0.0)
    second_moment = first_moment * first_moment
    for start in range(BLOCK_C, columns, BLOCK_C):
        c = start + lane
        mask = c < columns
        u = _load_sum(x_ptr, residual_ptr, s_ptr, row, c, x_stride, residual_stride, columns, mask)
        centred = tl.where(mask, u - reference, 0.0)
        first_moment += centred
        second_moment += centred * centred
    drift = tl.sum(first_moment, axis=0) / columns
    variance = tl.sum(second_moment, axis=0) / columns - drift * drift
    variance = tl.where(variance < 0.0, 0.0, variance)
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    tl.store(mean_ptr + row, reference + drift)
    tl.store(rstd_ptr + row, rstd)

    if residual_ptr is not None:
        tl.debug_barrier()  # s as this program has just written it
        from_ptr = s_ptr + row * columns
    else:
        from_ptr = x_ptr + row * x_stride
    for start in range(0, columns, BLOCK_C):
        c = start + lane
        mask = c < columns
        centred = tl.load(from_ptr + c, mask=mask, other=0.0).to(tl.float32) - reference
        _store_normalised(
            y_ptr, centred, drift, rstd, weight_ptr, bias_ptr, weight_stride, bias_stride, row, c, columns, mask, mask
        )


def plan_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Allocate (y, s, mean, rstd) and plan the launches that fill them; `meta` tensors will do."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    y = torch.empty_like(x)
    s = x.new_empty((0,), dtype=torch.float32) if residual is None else torch.empty_like(x)
    mean = x.new_empty((rows,), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    # What is missing is None and its stride 1: both are compiled in and cost nothing.
    arguments = {
        "x_ptr": x,
        "residual_ptr": residual,
        "s_ptr": None if residual is None else s,
        "y_ptr": y,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "x_stride": row_stride(x),
        "residual_stride": 1 if residual is None else row_stride(residual),
        "weight_stride": 1 if weight is None else weight.stride(0),
        "bias_stride": 1 if bias is None else bias.stride(0),
        "rows": rows,
        "columns": columns,
        "eps": float(eps),
    }
    tile = choose_tile(rows, columns, MAX_WHOLE_FORWARD)
    if tile is None:
        launch = Launch.of(
            _forward_blocks_kernel,
            programs=rows,
            arguments=arguments,
            constexprs={"BLOCK_C": BLOCK},
            num_warps=BLOCK_WARPS,
        )
    else:
        launch = Launch.of(
            _forward_whole_kernel,
            programs=triton.cdiv(rows, tile.rows),
            arguments=arguments,
            constexprs=tile.blocks(),
            num_warps=tile.num_warps,
        )
    return [launch], (y, s, mean, rstd)
