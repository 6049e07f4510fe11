"""Backward kernels of attention and the plan of their launches.

    p = exp(scale q k^T - lse),   delta = rowsum(o grad_o),   ds = p (grad_o v^T - delta)
    grad_q = scale ds k,   grad_k = scale ds^T q,   grad_v = p^T grad_o

The first kernel owns blocks of queries, computes delta on the way and leaves it for the second, which owns blocks of
keys. Where these are too few for the device the queries are split, and a third kernel adds up the splits in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Launch
from .device import (
    add_product,
    head_of,
    load_tile,
    part_columns,
    product_over_chunks,
    product_over_head,
    recompute_weights,
    row_dots,
    row_dots_over_chunks,
    row_strides,
    scale_tile,
    store_tile,
    zero_tile,
)
from .plan import RUNTIME_SIZES, empty_rows, head_constexprs, problem_of, stride_arguments, stride_unit
from .short import backward_short_kernel
from .tiles import (
    backward_parts,
    backward_tile,
    chunk,
    multiprocessors,
    padded,
    short_backward,
    short_backward_tile,
    slices,
    whole_slice,
)

SUM_BLOCK = 512
SUM_WARPS = 4


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _backward_queries_kernel(
    grad_o_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    grad_o_stride_b,
    grad_o_stride_h,
    grad_o_stride_n,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    o_stride_b,
    o_stride_h,
    o_stride_n,
    grad_q_stride_b,
    grad_q_stride_h,
    grad_q_stride_n,
    heads,
    queries,
    keys,
    tiles,
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
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    MASK_KEYS: tl.constexpr,
):
    program = tl.program_id(0)
    row = program % tiles * BLOCK + tl.arange(0, BLOCK)
    part = program // tiles % PARTS
    index = program // (tiles * PARTS)
    batch, head = head_of(index, heads)
    first_column, limit = part_columns(part, D, PART)
    q_row, k_row, v_row, o_row = row_strides(q_stride_n, k_stride_n, v_stride_n, o_stride_n, UNIT)
    grad_o_row, grad_q_row, _, _ = row_strides(grad_o_stride_n, grad_q_stride_n, q_stride_n, q_stride_n, UNIT)

    grad_o_ptr += (batch * grad_o_stride_b + head * grad_o_stride_h) * UNIT
    q_ptr += (batch * q_stride_b + head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + head * v_stride_h) * UNIT
    o_ptr += (batch * o_stride_b + head * o_stride_h) * UNIT
    grad_q_ptr += (batch * grad_q_stride_b + head * grad_q_stride_h) * UNIT + first_column
    of_head = index.to(tl.int64) * queries

    if PARTS == 1:
        q = load_tile(q_ptr, row, q_row, queries, D, SLICES, True, MASK_D)
        grad_o = load_tile(grad_o_ptr, row, grad_o_row, queries, D, SLICES, True, MASK_D)
        o = load_tile(o_ptr, row, o_row, queries, D, SLICES, True, MASK_D)
        delta = row_dots(o, grad_o)
    else:
        delta = row_dots_over_chunks(o_ptr, o_row, grad_o_ptr, grad_o_row, row, queries, D, CHUNK)
    if part == 0:
        tl.store(delta_ptr + of_head + row, delta, mask=row < queries)
    lse = tl.load(lse_ptr + of_head + row, mask=row < queries, other=0.0)
    grad_q = zero_tile(BLOCK, PART_SLICES)
    key = tl.arange(0, STEP)
    for first_key in range(0, keys, STEP):
        left = keys - first_key
        k_step, v_step = k_ptr + first_key * k_row, v_ptr + first_key * v_row
        if PARTS == 1:
            k = load_tile(k_step, key, k_row, left, D, SLICES, MASK_KEYS, MASK_D)
            v = load_tile(v_step, key, v_row, left, D, SLICES, MASK_KEYS, MASK_D)
            logits = product_over_head(q, k, PRECISION)
            grad_weights = product_over_head(grad_o, v, PRECISION)
        else:
            logits = product_over_chunks(q_ptr, row, q_row, queries, k_step, key, k_row, left, D, CHUNK, PRECISION)
            grad_weights = product_over_chunks(
                grad_o_ptr, row, grad_o_row, queries, v_step, key, v_row, left, D, CHUNK, PRECISION
            )
            k = load_tile(k_step + first_column, key, k_row, left, limit, PART_SLICES, MASK_KEYS, MASK_PART)
        weights = recompute_weights(logits, scale, lse[:, None])
        if MASK_KEYS:
            weights = tl.where((key < left)[None, :], weights, 0.0)
        grad_logits = weights * (grad_weights - delta[:, None])
        grad_q = add_product(grad_q, grad_logits, k, PRECISION)
    grad_q = scale_tile(grad_q, scale)
    store_tile(grad_q_ptr, row, grad_q_row, queries, limit, grad_q, PART_SLICES, MASK_PART)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _backward_keys_kernel(
    grad_o_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_o_stride_b,
    grad_o_stride_h,
    grad_o_stride_n,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    grad_kv_stride_split,
    grad_kv_stride_b,
    grad_kv_stride_h,
    grad_kv_stride_n,
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
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    MASK_QUERIES: tl.constexpr,
):
    program = tl.program_id(0)
    key = program % tiles * BLOCK + tl.arange(0, BLOCK)
    part = program // tiles % PARTS
    split = program // (tiles * PARTS) % splits
    index = program // (tiles * PARTS * splits)
    batch, head = head_of(index, heads)
    first_column, limit = part_columns(part, D, PART)
    q_row, k_row, v_row, grad_o_row = row_strides(q_stride_n, k_stride_n, v_stride_n, grad_o_stride_n, UNIT)
    grad_kv_row, _, _, _ = row_strides(grad_kv_stride_n, q_stride_n, q_stride_n, q_stride_n, UNIT)

    grad_o_ptr += (batch * grad_o_stride_b + head * grad_o_stride_h) * UNIT
    q_ptr += (batch * q_stride_b + head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + head * v_stride_h) * UNIT
    lse_ptr += index.to(tl.int64) * queries
    delta_ptr += index.to(tl.int64) * queries
    of_head = (split.to(tl.int64) * grad_kv_stride_split + batch * grad_kv_stride_b + head * grad_kv_stride_h) * UNIT
    of_part = of_head + first_column

    # Keys beyond the last are rows of zeros, whose gradients stay in rows that nobody stores.
    if PARTS == 1:
        k = load_tile(k_ptr, key, k_row, keys, D, SLICES, True, MASK_D)
        v = load_tile(v_ptr, key, v_row, keys, D, SLICES, True, MASK_D)
    grad_k = zero_tile(BLOCK, PART_SLICES)
    grad_v = zero_tile(BLOCK, PART_SLICES)
    row = tl.arange(0, STEP)
    for first_row in range(split * per_split, tl.minimum((split + 1) * per_split, queries), STEP):
        left = queries - first_row
        q_step, grad_o_step = q_ptr + first_row * q_row, grad_o_ptr + first_row * grad_o_row
        # exp(logit - inf) = 0: a query that does not exist adds nothing.
        lse = tl.load(lse_ptr + first_row + row, mask=row < left, other=float("inf"))
        delta = tl.load(delta_ptr + first_row + row, mask=row < left, other=0.0)
        if PARTS == 1:
            q = load_tile(q_step, row, q_row, left, D, SLICES, MASK_QUERIES, MASK_D)
            grad_o = load_tile(grad_o_step, row, grad_o_row, left, D, SLICES, MASK_QUERIES, MASK_D)
            logits = product_over_head(k, q, PRECISION)
            grad_weights = product_over_head(v, grad_o, PRECISION)
        else:
            logits = product_over_chunks(k_ptr, key, k_row, keys, q_step, row, q_row, left, D, CHUNK, PRECISION)
            grad_weights = product_over_chunks(
                v_ptr, key, v_row, keys, grad_o_step, row, grad_o_row, left, D, CHUNK, PRECISION
            )
            q = load_tile(q_step + first_column, row, q_row, left, limit, PART_SLICES, MASK_QUERIES, MASK_PART)
            grad_o = load_tile(
                grad_o_step + first_column, row, grad_o_row, left, limit, PART_SLICES, MASK_QUERIES, MASK_PART
            )
        weights = recompute_weights(logits, scale, lse[None, :])
        grad_logits = weights * (grad_weights - delta[None, :])
        grad_v = add_product(grad_v, weights, grad_o, PRECISION)
        grad_k = add_product(grad_k, grad_logits, q, PRECISION)
    grad_k = scale_tile(grad_k, scale)
    store_tile(grad_k_ptr + of_part, key, grad_kv_row, keys, limit, grad_k, PART_SLICES, MASK_PART)
    store_tile(grad_v_ptr + of_part, key, grad_kv_row, keys, limit, grad_v, PART_SLICES, MASK_PART)


@triton.jit(do_not_specialize=["size", "splits"])
def _sum_splits_kernel(partial_k_ptr, partial_v_ptr, grad_k_ptr, grad_v_ptr, size, splits, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    grad_k = tl.zeros((BLOCK,), tl.float32)
    grad_v = tl.zeros((BLOCK,), tl.float32)
    split_size = size.to(tl.int64)
    for split in range(splits):
        grad_k += tl.load(partial_k_ptr + split * split_size + offset, mask=mask, other=0.0)
        grad_v += tl.load(partial_v_ptr + split * split_size + offset, mask=mask, other=0.0)
    tl.store(grad_k_ptr + offset, grad_k.to(grad_k_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_v_ptr + offset, grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask)


def plan_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Allocate (grad_q, grad_k, grad_v) and plan the launches that fill them; `meta` tensors will do."""
    problem = problem_of(q, k, v, grad_o, o)
    processors = multiprocessors(q.device)
    short = short_backward(problem)
    if short:
        tile = short_backward_tile(problem, processors)
    else:
        tile = backward_tile(problem.keys, problem.queries, problem, processors, split=True)
    grad_q, grad_k, grad_v = empty_rows(q), empty_rows(k), empty_rows(v)
    if tile.splits == 1:
        partial_k, partial_v = grad_k, grad_v
    else:
        partial_k, partial_v = empty_rows(k, tile.splits), empty_rows(v, tile.splits)
    unit = stride_unit(grad_o, q, k, v, o, grad_q, partial_k)
    arguments = {
        "grad_o_ptr": grad_o,
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "o_ptr": o,
        "lse_ptr": lse,
        "delta_ptr": None,
        "grad_q_ptr": grad_q,
        "grad_k_ptr": partial_k,
        "grad_v_ptr": partial_v,
        **stride_arguments(unit, grad_o=grad_o, q=q, k=k, v=v, o=o, grad_q=grad_q, grad_kv=partial_k),
        "heads": q.shape[1],
        "queries": problem.queries,
        "keys": problem.keys,
        "splits": tile.splits,
        "per_split": tile.per_split,
        "scale": float(scale),
    }
    parts = backward_parts(problem)
    constexprs = head_constexprs(problem, parts, unit, q.dtype) | {"CHUNK": chunk(problem)}
    overhang = {"MASK_QUERIES": problem.queries % tile.step != 0}
    if short:
        head = whole_slice(problem.head_dim)
        of_short = {"SLICES": head, "MASK_D": padded(head) != problem.head_dim, "KEYS": slices(problem.keys)}
        launches = [
            Launch.of(
                backward_short_kernel,
                programs=problem.heads * tile.splits,
                arguments=arguments,
                constexprs=constexprs | of_short | overhang | {"STEP": tile.step},
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
        ]
    else:
        arguments["delta_ptr"] = torch.empty_like(lse)
        own = backward_tile(problem.queries, problem.keys, problem, processors, split=False)
        query_tiles, key_tiles = triton.cdiv(problem.queries, own.block), triton.cdiv(problem.keys, tile.block)
        launches = [
            Launch.of(
                _backward_queries_kernel,
                programs=problem.heads * parts.count * query_tiles,
                arguments=arguments | {"tiles": query_tiles},
                constexprs=constexprs
                | {"BLOCK": own.block, "STEP": own.step, "MASK_KEYS": problem.keys % own.step != 0},
                num_warps=own.num_warps,
                num_stages=own.num_stages,
            ),
            Launch.of(
                _backward_keys_kernel,
                programs=problem.heads * tile.splits * parts.count * key_tiles,
                arguments=arguments | {"tiles": key_tiles},
                constexprs=constexprs | overhang | {"BLOCK": tile.block, "STEP": tile.step},
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            ),
        ]
    if tile.splits > 1:
        launches.append(_plan_sum(partial_k, partial_v, grad_k, grad_v))
    return launches, (grad_q, grad_k, grad_v)


def _plan_sum(partial_k: torch.Tensor, partial_v: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor) -> Launch:
    size = grad_k.numel()
    return Launch.of(
        _sum_splits_kernel,
        programs=triton.cdiv(size, SUM_BLOCK),
        arguments={
            "partial_k_ptr": partial_k,
            "partial_v_ptr": partial_v,
            "grad_k_ptr": grad_k,
            "grad_v_ptr": grad_v,
            "size": size,
            "splits": partial_k.shape[0],
        },
        constexprs={"BLOCK": SUM_BLOCK},
        num_warps=SUM_WARPS,
    )
