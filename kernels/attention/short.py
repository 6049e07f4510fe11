"""Kernels of attention over so few keys that a program holds them all: the 77 tokens of a text.

`KEYS` are slices of the keys as `SLICES` are of the head dimension: 77 keys are 64 + 16, not 128. The forward is a
plain softmax, without a loop. The backward is one kernel: a block of queries meets every key, so its own gradient is
complete when the block is done, while the gradients of k and v wait in registers for the next block.
"""

# ruff: noqa: RUF005 - Triton's language has no starred tuples

import triton
import triton.language as tl

from .device import (
    LN_2,
    LOG2_E,
    add_product,
    head_of,
    load_tile,
    part_columns,
    product_over_head,
    recompute_weights,
    row_dots,
    row_strides,
    scale_tile,
    store_tile,
    zero_tile,
)
from .plan import RUNTIME_SIZES


@triton.jit
def _load_keys(ptr, row_stride, keys, limit, KEYS: tl.constexpr, SLICES: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """One tile per slice of the keys."""
    tiles = ()
    for j in tl.static_range(len(KEYS)):
        key = KEYS[j][0] + tl.arange(0, KEYS[j][1])
        tiles = tiles + (load_tile(ptr, key, row_stride, keys, limit, SLICES, True, MASK_COLUMNS),)
    return tiles


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def forward_short_kernel(
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
    o_stride_b,
    o_stride_h,
    o_stride_n,
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
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):
    program = tl.program_id(0)
    row = program % tiles * BLOCK + tl.arange(0, BLOCK)
    part = program // tiles % PARTS
    index = program // (tiles * PARTS)
    batch, head = head_of(index, heads)
    first_column, limit = part_columns(part, D, PART)
    q_row, k_row, v_row, o_row = row_strides(q_stride_n, k_stride_n, v_stride_n, o_stride_n, UNIT)

    q_ptr += (batch * q_stride_b + head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + head * v_stride_h) * UNIT + first_column
    o_ptr += (batch * o_stride_b + head * o_stride_h) * UNIT + first_column

    q = load_tile(q_ptr, row, q_row, queries, D, SLICES, True, MASK_D)
    k = _load_keys(k_ptr, k_row, keys, D, KEYS, SLICES, MASK_D)
    v = _load_keys(v_ptr, v_row, keys, limit, KEYS, PART_SLICES, MASK_PART)
    scale_log2 = scale * LOG2_E
    logits = ()
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for j in tl.static_range(len(KEYS)):
        of_slice = product_over_head(q, k[j], PRECISION) * scale_log2
        key = KEYS[j][0] + tl.arange(0, KEYS[j][1])
        of_slice = tl.where((key < keys)[None, :], of_slice, float("-inf"))
        largest = tl.maximum(largest, tl.max(of_slice, axis=1))
        logits = logits + (of_slice,)
    total = tl.zeros((BLOCK,), tl.float32)
    o = zero_tile(BLOCK, PART_SLICES)
    for j in tl.static_range(len(KEYS)):
        weights = tl.exp2(logits[j] - largest[:, None])
        total += tl.sum(weights, axis=1)
        o = add_product(o, weights, v[j], PRECISION)

    o = scale_tile(o, (1.0 / total)[:, None])
    store_tile(o_ptr, row, o_row, queries, limit, o, PART_SLICES, MASK_PART)
    if part == 0:
        lse_ptr += index.to(tl.int64) * queries
        tl.store(lse_ptr + row, (largest + tl.log2(total)) * LN_2, mask=row < queries)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def backward_short_kernel(
    grad_o_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    grad_q_ptr,
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
    o_stride_b,
    o_stride_h,
    o_stride_n,
    grad_q_stride_b,
    grad_q_stride_h,
    grad_q_stride_n,
    grad_kv_stride_split,
    grad_kv_stride_b,
    grad_kv_stride_h,
    grad_kv_stride_n,
    heads,
    queries,
    keys,
    splits,
    per_split,
    scale,
    D: tl.constexpr,
    SLICES: tl.constexpr,
    MASK_D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    STEP: tl.constexpr,
    MASK_QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    program = tl.program_id(0)
    split = program % splits
    index = program // splits
    batch, head = head_of(index, heads)
    q_row, k_row, v_row, o_row = row_strides(q_stride_n, k_stride_n, v_stride_n, o_stride_n, UNIT)
    grad_o_row, grad_q_row, grad_kv_row, _ = row_strides(
        grad_o_stride_n, grad_q_stride_n, grad_kv_stride_n, q_stride_n, UNIT
    )

    grad_o_ptr += (batch * grad_o_stride_b + head * grad_o_stride_h) * UNIT
    q_ptr += (batch * q_stride_b + head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + head * v_stride_h) * UNIT
    o_ptr += (batch * o_stride_b + head * o_stride_h) * UNIT
    lse_ptr += index.to(tl.int64) * queries
    grad_q_ptr += (batch * grad_q_stride_b + head * grad_q_stride_h) * UNIT
    of_head = (split.to(tl.int64) * grad_kv_stride_split + batch * grad_kv_stride_b + head * grad_kv_stride_h) * UNIT

    k = _load_keys(k_ptr, k_row, keys, D, KEYS, SLICES, MASK_D)
    v = _load_keys(v_ptr, v_row, keys, D, KEYS, SLICES, MASK_D)
    grad_k = ()
    grad_v = ()
    for j in tl.static_range(len(KEYS)):
        grad_k = grad_k + (zero_tile(KEYS[j][1], SLICES),)
        grad_v = grad_v + (zero_tile(KEYS[j][1], SLICES),)
    row = tl.arange(0, STEP)
    for first_row in range(split * per_split, tl.minimum((split + 1) * per_split, queries), STEP):
        left = queries - first_row
        q = load_tile(q_ptr + first_row * q_row, row, q_row, left, D, SLICES, MASK_QUERIES, MASK_D)
        grad_o = load_tile(grad_o_ptr + first_row * grad_o_row, row, grad_o_row, left, D, SLICES, MASK_QUERIES, MASK_D)
        o = load_tile(o_ptr + first_row * o_row, row, o_row, left, D, SLICES, MASK_QUERIES, MASK_D)
        delta = row_dots(o, grad_o)[:, None]
        # exp(logit - inf) = 0: a query that does not exist adds nothing.
        lse = tl.load(lse_ptr + first_row + row, mask=row < left, other=float("inf"))[:, None]
        grad_q = zero_tile(STEP, SLICES)
        next_grad_k = ()
        next_grad_v = ()
        for j in tl.static_range(len(KEYS)):
            weights = recompute_weights(product_over_head(q, k[j], PRECISION), scale, lse)
            key = KEYS[j][0] + tl.arange(0, KEYS[j][1])
            weights = tl.where((key < keys)[None, :], weights, 0.0)
            next_grad_v = next_grad_v + (add_product(grad_v[j], tl.trans(weights), grad_o, PRECISION),)
            grad_logits = weights * (product_over_head(grad_o, v[j], PRECISION) - delta)
            next_grad_k = next_grad_k + (add_product(grad_k[j], tl.trans(grad_logits), q, PRECISION),)
            grad_q = add_product(grad_q, grad_logits, k[j], PRECISION)
        grad_k = next_grad_k
        grad_v = next_grad_v
        grad_q = scale_tile(grad_q, scale)
        store_tile(grad_q_ptr + first_row * grad_q_row, row, grad_q_row, left, D, grad_q, SLICES, MASK_D)

    for j in tl.static_range(len(KEYS)):
        key = KEYS[j][0] + tl.arange(0, KEYS[j][1])
        store_tile(grad_k_ptr + of_head, key, grad_kv_row, keys, D, scale_tile(grad_k[j], scale), SLICES, MASK_D)
        store_tile(grad_v_ptr + of_head, key, grad_kv_row, keys, D, grad_v[j], SLICES, MASK_D)
