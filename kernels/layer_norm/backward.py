"""Backward kernels of LayerNorm and the plan of their launches.

    grad_x = rstd (w dy - m1 - xhat m2) + grad_s,   m1 = mean(w dy),  m2 = mean(w dy xhat)
    grad_weight = sum over rows of dy xhat,         grad_bias = sum over rows of dy

*Whole*: a program holds rows in registers, reads them once, walks the rows in turns with the others and leaves one
partial sum per column; a second kernel adds these up in order. *Blocks*: a longer row is read twice, and the partial
sums lie in memory that each program has for itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Launch
from .forward import load_parameter
from .tiles import (
    BLOCK,
    BLOCK_WARPS,
    MAX_WHOLE_BACKWARD,
    SUM_BLOCK,
    SUM_WARPS,
    choose_programs,
    choose_tile,
    row_stride,
)


@triton.jit
def _load_gradient(grad_y_ptr, s_ptr, r, c, grad_y_stride, s_stride, mean, rstd, mask):
    """dy and xhat, up to the rounding error of the mean."""
    dy = tl.load(grad_y_ptr + r * grad_y_stride + c, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + r * s_stride + c, mask=mask, other=0.0).to(tl.float32)
    return dy, tl.where(mask, (s - mean) * rstd, 0.0)


@triton.jit
def _means(sum_wdy, sum_wdy_xhat, sum_xhat, columns):
    """m1, m2 and the mean of xhat, which is what float32 has lost of the row's mean: |mean| >> std costs no digits."""
    m1 = sum_wdy / columns
    drift = sum_xhat / columns
    return m1, sum_wdy_xhat / columns - drift * m1, drift


@triton.jit
def _store_grad_x(grad_x_ptr, grad_s_ptr, wdy, xhat, m1, m2, rstd, r, c, grad_s_stride, columns, mask):
    # A row of one value: y does not depend on it, but the rounding of w dy times rstd = 1/sqrt(eps) would.
    factor = tl.where(columns > 1, rstd, 0.0)
    grad_x = (wdy - m1 - xhat * m2) * factor
    if grad_s_ptr is not None:
        grad_x += tl.load(grad_s_ptr + r * grad_s_stride + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr + r * columns + c, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward_whole_kernel(
    grad_y_ptr,
    grad_s_ptr,
    s_ptr,
    grad_x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    partial_ptr,
    grad_y_stride,
    grad_s_stride,
    s_stride,
    weight_stride,
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """`partial` (programs, 2, columns): sums of dy xhat and of dy over the program's rows; None leaves them out."""
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, HEAD)[None, :]
    in_row = c < columns
    w = load_parameter(weight_ptr, c, weight_stride, in_row, 1.0)
    if TAIL > 0:
        c_tail = HEAD + tl.arange(0, TAIL)[None, :]
        in_tail = c_tail < columns
        w_tail = load_parameter(weight_ptr, c_tail, weight_stride, in_tail, 1.0)
    if partial_ptr is not None:
        grad_weight = tl.zeros((BLOCK_R, HEAD), tl.float32)
        grad_bias = tl.zeros((BLOCK_R, HEAD), tl.float32)
        if TAIL > 0:
            grad_weight_tail = tl.zeros((BLOCK_R, TAIL), tl.float32)
            grad_bias_tail = tl.zeros((BLOCK_R, TAIL), tl.float32)

    for first_row in range(program * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = first_row + tl.arange(0, BLOCK_R)
        in_rows = row < rows
        r = row[:, None]
        mask = in_rows[:, None] & in_row
        mean = tl.load(mean_ptr + row, mask=in_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)[:, None]
        dy, xhat = _load_gradient(grad_y_ptr, s_ptr, r, c, grad_y_stride, s_stride, mean, rstd, mask)
        wdy = dy * w
        sum_wdy = tl.sum(wdy, axis=1)
        sum_wdy_xhat = tl.sum(wdy * xhat, axis=1)
        sum_xhat = tl.sum(xhat, axis=1)
        if TAIL > 0:
            mask_tail = in_rows[:, None] & in_tail
            dy_tail, xhat_tail = _load_gradient(
                grad_y_ptr, s_ptr, r, c_tail, grad_y_stride, s_stride, mean, rstd, mask_tail
            )
            wdy_tail = dy_tail * w_tail
            sum_wdy += tl.sum(wdy_tail, axis=1)
            sum_wdy_xhat += tl.sum(wdy_tail * xhat_tail, axis=1)
            sum_xhat += tl.sum(xhat_tail, axis=1)
        m1, m2, drift = _means(sum_wdy, sum_wdy_xhat, sum_xhat, columns)
        m1, m2, drift = m1[:, None], m2[:, None], drift[:, None]

        xhat -= drift
        _store_grad_x(grad_x_ptr, grad_s_ptr, wdy, xhat, m1, m2, rstd, r, c, grad_s_stride, columns, mask)
        if TAIL > 0:
            xhat_tail -= drift
            _store_grad_x(
                grad_x_ptr,
                grad_s_ptr,
                wdy_tail,
                xhat_tail,
                m1,
                m2,
                rstd,
                r,
                c_tail,
                grad_s_stride,
                columns,
                mask_tail,
            )
        if partial_ptr is not None:  # where dy is 0 beside the row, xhat is finite
            grad_weight += dy * xhat
            grad_bias += dy
            if TAIL > 0:
                grad_weight_tail += dy_tail * xhat_tail
                grad_bias_tail += dy_tail

    if partial_ptr is not None:
        own = partial_ptr + program * 2 * columns
        c = tl.arange(0, HEAD)
        tl.store(own + c, tl.sum(grad_weight, axis=0), mask=c < columns)
        tl.store(own + columns + c, tl.sum(grad_bias, axis=0), mask=c < columns)
        if TAIL > 0:
            c = HEAD + tl.arange(0, TAIL)
            tl.store(own + c, tl.sum(grad_weight_tail, axis=0), mask=c < columns)
            tl.store(own + columns + c, tl.sum(grad_bias_tail, axis=0), mask=c < columns)


@triton.jit(do_not_specialize=["rows"])
def _backward_blocks_kernel(
    grad_y_ptr,
    grad_s_ptr,
    s_ptr,
    grad_x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    partial_ptr,
    grad_y_stride,
    grad_s_stride,
    s_stride,
    weight_stride,
    rows,
    columns,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    for row in range(program, rows, tl.num_programs(0)):
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        sum_wdy = tl.zeros((BLOCK_C,), tl.float32)
        sum_wdy_xhat = tl.zeros((BLOCK_C,), tl.float32)
        sum_xhat = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, columns, BLOCK_C):
            c = start + lane
            mask = c < columns
            dy, xhat = _load_gradient(grad_y_ptr, s_ptr, row, c, grad_y_stride, s_stride, mean, rstd, mask)
            wdy = dy * load_parameter(weight_ptr, c, weight_stride, mask, 1.0)
            sum_wdy += wdy
            sum_wdy_xhat += wdy * xhat
            sum_xhat += xhat
        m1, m2, drift = _means(tl.sum(sum_wdy, axis=0), tl.sum(sum_wdy_xhat, axis=0), tl.sum(sum_xhat, axis=0), columns)
        for start in range(0, columns, BLOCK_C):
            c = start + lane
            mask = c < columns
            dy, xhat = _load_gradient(grad_y_ptr, s_ptr, row, c, grad_y_stride, s_stride, mean, rstd, mask)
            xhat -= drift
            wdy = dy * load_parameter(weight_ptr, c, weight_stride, mask, 1.0)
            _store_grad_x(grad_x_ptr, grad_s_ptr, wdy, xhat, m1, m2, rstd, row, c, grad_s_stride, columns, mask)
            if partial_ptr is not None:
                own = partial_ptr + program * 2 * columns + c
                so_far = c < tl.where(row == program, 0, columns)  # nothing before the first row
                grad_weight = tl.load(own, mask=so_far, other=0.0) + dy * xhat
                grad_bias = tl.load(own + columns, mask=so_far, other=0.0) + dy
                tl.store(own, grad_weight, mask=mask)
                tl.store(own + columns, grad_bias, mask=mask)
        tl.debug_barrier()  # the next row reads the sums of this one


@triton.jit(do_not_specialize=["programs"])
def _sum_partials_kernel(
    partial_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    programs,
    columns,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_P)[:, None].to(tl.int64)
    grad_weight = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    grad_bias = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, programs, BLOCK_P):
        mask = (first + lane < programs) & (c < columns)[None, :]
        partial = partial_ptr + (first + lane) * 2 * columns + c[None, :]
        grad_weight += tl.load(partial, mask=mask, other=0.0)
        grad_bias += tl.load(partial + columns, mask=mask, other=0.0)
    tl.store(grad_weight_ptr + c, tl.sum(grad_weight, axis=0), mask=c < columns)
    tl.store(grad_bias_ptr + c, tl.sum(grad_bias, axis=0), mask=c < columns)


def plan_backward(
    grad_y: torch.Tensor,
    grad_s: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    parameters: bool,
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Allocate (grad_x, grad_weight, grad_bias) and plan the launches that fill them; `meta` tensors will do."""
    columns = s.shape[-1]
    rows = s.numel() // columns
    grad_x = torch.empty_like(s)
    grad_weight = s.new_empty((columns if parameters else 0,), dtype=torch.float32)
    grad_bias = torch.empty_like(grad_weight)

    tile = choose_tile(rows, columns, MAX_WHOLE_BACKWARD)
    tiles, num_warps = (rows, BLOCK_WARPS) if tile is None else (triton.cdiv(rows, tile.rows), tile.num_warps)
    programs = choose_programs(tiles, num_warps) if parameters else tiles
    partial = s.new_empty((programs, 2, columns), dtype=torch.float32) if parameters else None
    arguments = {
        "grad_y_ptr": grad_y,
        "grad_s_ptr": grad_s,
        "s_ptr": s,
        "grad_x_ptr": grad_x,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "weight_ptr": weight,
        "partial_ptr": partial,
        "grad_y_stride": row_stride(grad_y),
        "grad_s_stride": 1 if grad_s is None else row_stride(grad_s),
        "s_stride": row_stride(s),
        "weight_stride": 1 if weight is None else weight.stride(0),
        "rows": rows,
        "columns": columns,
    }
    launches = [
        Launch.of(
            _backward_blocks_kernel if tile is None else _backward_whole_kernel,
            programs=programs,
            arguments=arguments,
            constexprs={"BLOCK_C": BLOCK} if tile is None else tile.blocks(),
            num_warps=num_warps,
        )
    ]
    if parameters:
        launches.append(
            Launch.of(
                _sum_partials_kernel,
                programs=triton.cdiv(columns, SUM_BLOCK["BLOCK_C"]),
                arguments={
                    "partial_ptr": partial,
                    "grad_weight_ptr": grad_weight,
                    "grad_bias_ptr": grad_bias,
                    "programs": programs,
                    "columns": columns,
                },
                constexprs=SUM_BLOCK,
                num_warps=SUM_WARPS,
            )
        )
    return launches, (grad_x, grad_weight, grad_bias)
