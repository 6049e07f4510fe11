"""What the kernels of attention have in common, as Triton device functions.

A tile of a tensor (rows, head dimension) is a tuple with one Triton tensor per slice of the head dimension: Triton's
blocks are powers of two, head dimensions are not. `SLICES` is a tuple of (first column, width); only the last slice
may hang over the head dimension.
"""

# ruff: noqa: RUF005 - Triton's language has no starred tuples

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    ptr, rows, row_stride, end, limit, SLICES: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr
):
    """Rows of a tensor, 0 beyond row `end` and column `limit`."""
    tile = ()
    for i in tl.static_range(len(SLICES)):
        column = SLICES[i][0] + tl.arange(0, SLICES[i][1])[None, :]
        mask = tl.full((rows.shape[0], SLICES[i][1]), 1, tl.int1)
        if MASK_ROWS:
            mask = mask & (rows < end)[:, None]
        if MASK_COLUMNS and i == len(SLICES) - 1:
            mask = mask & (column < limit)
        tile = tile + (tl.load(ptr + rows[:, None] * row_stride + column, mask=mask, other=0.0),)
    return tile


@triton.jit
def store_tile(ptr, rows, row_stride, end, limit, tile, SLICES: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    for i in tl.static_range(len(SLICES)):
        column = SLICES[i][0] + tl.arange(0, SLICES[i][1])[None, :]
        mask = (rows < end)[:, None]
        if MASK_COLUMNS and i == len(SLICES) - 1:
            mask = mask & (column < limit)
        tl.store(ptr + rows[:, None] * row_stride + column, tile[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_tile(ROWS: tl.constexpr, SLICES: tl.constexpr):
    tile = ()
    # Not tl.zeros: up to Triton 3.6 no plain integer, as a constexpr tuple's are, may be passed on inside a shape.
    for i in tl.static_range(len(SLICES)):
        tile = tile + (tl.full((ROWS, SLICES[i][1]), 0.0, tl.float32),)
    return tile


@triton.jit
def scale_tile(tile, factor):
    """Each row, or the whole tile, times `factor`."""
    scaled = ()
    for i in tl.static_range(len(tile)):
        scaled = scaled + (tile[i] * factor,)
    return scaled


@triton.jit
def row_dots(a, b):
    """The sum over the head dimension of a b, in float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), axis=1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), axis=1)
    return total


@triton.jit
def _add_dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b; PRECISION as `plan.precision` says."""
    if PRECISION == "upcast":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        total = tl.dot(a, b, accumulator, input_precision="ieee")
    else:
        total = tl.dot(a, b, accumulator, input_precision=PRECISION)
    return total


@triton.jit
def product_over_head(a, b, PRECISION: tl.constexpr):
    """a b^T: (rows of a, rows of b)."""
    product = tl.zeros((a[0].shape[0], b[0].shape[0]), tl.float32)
    for i in tl.static_range(len(a)):
        product = _add_dot(a[i], tl.trans(b[i]), product, PRECISION)
    return product


@triton.jit
def product_over_chunks(
    a_ptr, a, a_row, a_end, b_ptr, b, b_row, b_end, D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr
):
    """a b^T for rows `a` and `b` of two tensors, read a chunk of the head dimension at a time: for heads too wide to be
    held."""
    lane = tl.arange(0, CHUNK)[None, :]
    product = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    for first in range(0, D, CHUNK):
        column = first + lane
        in_head = column < D
        of_a = tl.load(a_ptr + a[:, None] * a_row + column, mask=(a < a_end)[:, None] & in_head, other=0.0)
        of_b = tl.load(b_ptr + b[:, None] * b_row + column, mask=(b < b_end)[:, None] & in_head, other=0.0)
        product = _add_dot(of_a, tl.trans(of_b), product, PRECISION)
    return product


@triton.jit
def row_dots_over_chunks(a_ptr, a_row, b_ptr, b_row, row, end, D: tl.constexpr, CHUNK: tl.constexpr):
    """`row_dots` of the same rows of two tensors, read like `product_over_chunks`."""
    lane = tl.arange(0, CHUNK)[None, :]
    total = tl.zeros((row.shape[0],), tl.float32)
    for first in range(0, D, CHUNK):
        column = first + lane
        mask = (row < end)[:, None] & (column < D)
        of_a = tl.load(a_ptr + row[:, None] * a_row + column, mask=mask, other=0.0).to(tl.float32)
        of_b = tl.load(b_ptr + row[:, None] * b_row + column, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(of_a * of_b, axis=1)
    return total


@triton.jit
def add_product(accumulator, weights, tile, PRECISION: tl.constexpr):
    """accumulator + weights tile, the weights rounded to the tile's dtype as the tensor cores take them."""
    total = ()
    for i in tl.static_range(len(tile)):
        total = total + (_add_dot(weights.to(tile[i].dtype), tile[i], accumulator[i], PRECISION),)
    return total


@triton.jit
def recompute_weights(product, scale, lse):
    """exp(scale product - lse). The difference comes first: large logits lose no more than lse has lost."""
    return tl.exp2((product * scale - lse) * LOG2_E)


@triton.jit
def head_of(index, heads):
    """(batch, head) of a flat index, as int64: every offset that is made of them is."""
    index = index.to(tl.int64)
    return index // heads, index % heads


@triton.jit
def part_columns(part, D: tl.constexpr, PART: tl.constexpr):
    """First column of a part of the head dimension, and its number of columns."""
    first = part * PART
    return first, tl.multiple_of(tl.minimum(PART, D - first), 8)


@triton.jit
def row_strides(a, b, c, d, UNIT: tl.constexpr):
    """In elements, as int64: no offset that is made of them overflows."""
    return a.to(tl.int64) * UNIT, b.to(tl.int64) * UNIT, c.to(tl.int64) * UNIT, d.to(tl.int64) * UNIT
