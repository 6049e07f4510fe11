"""Forward kernels of attention and the plan of their launches.

    o = softmax(scale q k^T) v,   lse = log(sum over the keys of exp(scale q k^T))

A program owns a block of queries and walks over the keys with a running maximum and sum (online softmax). With few
programs and many keys the keys are split: each split leaves its own o and lse, and a second kernel combines them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Launch
from .device import (
    LN_2,
    LOG2_E,
    add_product,
    head_of,
    load_tile,
    part_columns,
    product_over_head,
    row_strides,
    scale_tile,
    store_tile,
    zero_tile,
)
from .plan import RUNTIME_SIZES, empty_rows, head_constexprs, problem_of, stride_arguments, stride_unit
from .short import forward_short_kernel
from .tiles import (
    Tile,
    forward_parts,
    forward_tile,
    multiprocessors,
    short_forward,
    short_forward_tile,
    slices,
)

COMBINE_ROWS = 4
COMBINE_WARPS = 4


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    o_stride_split,
    o_stride_b,
    o_stride_h,
    o_stride_n,
    lse_stride_split,
    heads,
    queries,
    keys,
    tiles,
    splits,
    per_split,
    scale,
    D: tl.constexpr,
    SLICES: tl.constexpr,
    MASK_D: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    PART_SLICES: tl.constexpr,
    MASK_PART: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    MASK_KEYS: tl.constexpr,
):
    program = tl.program_id(0)
    row = program % tiles * BLOCK + tl.arange(0, BLOCK)
    part = program // tiles % PARTS
    split = program // (tiles * PARTS) % splits
    index = program // (tiles * PARTS * splits)
    batch, head = head_of(index, heads)
    first_column, limit = part_columns(part, D, PART)
    q_row, k_row, v_row, o_row = row_strides(q_stride_n, k_stride_n, v_stride_n, o_stride_n, UNIT)

    q_ptr += (batch * q_stride_b + head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + head * v_stride_h) * UNIT + first_column
    o_ptr += (split.to(tl.int64) * o_stride_split + batch * o_stride_b + head * o_stride_h) * UNIT + first_column
    lse_ptr += split.to(tl.int64) * lse_stride_split + index.to(tl.int64) * queries

    q = load_tile(q_ptr, row, q_row, queries, D, SLICES, True, MASK_D)
    scale_log2 = scale * LOG2_E
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    o = zero_tile(BLOCK, PART_SLICES)
    key = tl.arange(0, STEP)
    for first_key in range(split * per_split, tl.minimum((split + 1) * per_split, keys), STEP):
        left = keys - first_key
        k = load_tile(k_ptr + first_key * k_row, key, k_row, left, D, SLICES, MASK_KEYS, MASK_D)
        logits = product_over_head(q, k, PRECISION) * scale_log2
        if MASK_KEYS:
            logits = tl.where((key < left)[None, :], logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        weights = tl.exp2(logits - new_largest[:, None])
        correction = tl.exp2(largest - new_largest)
        total = total * correction + tl.sum(weights, axis=1)
        v = load_tile(v_ptr + first_key * v_row, key, v_row, left, limit, PART_SLICES, MASK_KEYS, MASK_PART)
        o = add_product(scale_tile(o, correction[:, None]), weights, v, PRECISION)
        largest = new_largest

    o = scale_tile(o, (1.0 / total)[:, None])
    store_tile(o_ptr, row, o_row, queries, limit, o, PART_SLICES, MASK_PART)
    if part == 0:
        tl.store(lse_ptr + row, (largest + tl.log2(total)) * LN_2, mask=row < queries)


@triton.jit(do_not_specialize=["heads", "queries", "rows", "splits"])
def _combine_kernel(
    partial_ptr,
    partial_lse_ptr,
    o_ptr,
    lse_ptr,
    heads,
    queries,
    rows,
    splits,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """o = sum over the splits of o_s exp(lse_s - lse), lse = log(sum of exp(lse_s)). Rows in the order (B, N, H)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < rows
    column = tl.arange(0, BLOCK_D)[None, :]
    offset = row[:, None] * D + column
    mask = in_rows[:, None] & (column < D)
    head = row % heads
    query = row // heads % queries
    lse_row = (row // heads // queries * heads + head) * queries + query

    largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    split_rows = rows.to(tl.int64)
    for split in range(splits):
        lse = tl.load(partial_lse_ptr + split * split_rows + lse_row, mask=in_rows, other=0.0)
        largest = tl.maximum(largest, lse)
    total = tl.zeros((BLOCK_R,), tl.float32)
    o = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for split in range(splits):
        lse = tl.load(partial_lse_ptr + split * split_rows + lse_row, mask=in_rows, other=0.0)
        weight = tl.exp(lse - largest)
        total += weight
        o += weight[:, None] * tl.load(partial_ptr + split * split_rows * D + offset, mask=mask, other=0.0)
    tl.store(o_ptr + offset, (o / total[:, None]).to(o_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + lse_row, largest + tl.log(total), mask=in_rows)


def plan_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor]]:
    """Allocate (o, lse) and plan the launches that fill them; `meta` tensors will do."""
    problem = problem_of(q, k, v)
    processors = multiprocessors(q.device)
    short = short_forward(problem)
    parts = forward_parts(problem)
    tile = (short_forward_tile if short else forward_tile)(problem, processors)
    o = empty_rows(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if tile.splits == 1:
        partial, partial_lse = o, lse
    else:
        partial, partial_lse = empty_rows(q, tile.splits), lse.new_empty((tile.splits, *lse.shape))
    unit = stride_unit(q, k, v, partial)
    tiles = triton.cdiv(problem.queries, tile.block)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "o_ptr": partial,
        "lse_ptr": partial_lse,
        **stride_arguments(unit, q=q, k=k, v=v, o=partial),
        "lse_stride_split": lse.numel(),
        "heads": q.shape[1],
        "queries": problem.queries,
        "keys": problem.keys,
        "tiles": tiles,
        "splits": tile.splits,
        "per_split": tile.per_split,
        "scale": float(scale),
    }
    constexprs = head_constexprs(problem, parts, unit, q.dtype) | {"BLOCK": tile.block}
    if short:
        kernel, constexprs["KEYS"] = forward_short_kernel, slices(problem.keys)
    else:
        kernel = _forward_kernel
        constexprs |= {"STEP": tile.step, "MASK_KEYS": problem.keys % tile.step != 0}
    forward = Launch.of(
        kernel,
        programs=tiles * parts.count * tile.splits * problem.heads,
        arguments=arguments,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    launches = [forward] if tile.splits == 1 else [forward, _plan_combine(partial, partial_lse, o, lse, tile)]
    return launches, (o, lse)


def _plan_combine(
    partial: torch.Tensor, partial_lse: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, tile: Tile
) -> Launch:
    head_dim = o.shape[-1]
    return Launch.of(
        _combine_kernel,
        programs=triton.cdiv(lse.numel(), COMBINE_ROWS),
        arguments={
            "partial_ptr": partial,
            "partial_lse_ptr": partial_lse,
            "o_ptr": o,
            "lse_ptr": lse,
            "heads": o.shape[1],
            "queries": o.shape[2],
            "rows": lse.numel(),
            "splits": tile.splits,
        },
        constexprs={"D": head_dim, "BLOCK_R": COMBINE_ROWS, "BLOCK_D": triton.next_power_of_2(head_dim)},
        num_warps=COMBINE_WARPS,
    )
