"""How a tensor lies in memory: (N, C, *spatial) read as (N, C, S), and (..., L) read as rows. csrc/layout.h keeps the
same rules."""

from __future__ import annotations

import torch


def collapse_spatial(t: torch.Tensor) -> tuple[int, int] | None:
    """(S, stride) of dimensions 2… walked as one; None where no single stride does it."""
    size, stride = 1, 1
    first = True
    for length, step in zip(reversed(t.shape[2:]), reversed(t.stride()[2:])):
        if length == 1:
            continue
        if first:
            stride, first = step, False
        elif step != stride * size:
            return None
        size *= length
    return size, stride


def layout_of(x: torch.Tensor) -> str | None:
    """How x lies: "contiguous", "channels_last", or None where neither reading holds.

    Contiguous: a channel's S values side by side, then the next channel. Channels last: a pixel's C values side by
    side. Samples may be any distance apart that keeps them from overlapping.
    """
    if x.is_contiguous():  # the two usual cases, without walking the strides
        return "contiguous"
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    spatial = collapse_spatial(x)
    if spatial is None:
        return None
    size, s_stride = spatial
    n, c = x.shape[:2]
    n_stride, c_stride = x.stride()[:2]
    if (size == 1 or s_stride == 1) and (c == 1 or c_stride == size):
        return "contiguous" if n <= 1 or n_stride >= c * size else None
    if (c == 1 or c_stride == 1) and s_stride >= c:
        return "channels_last" if n <= 1 or n_stride >= (size - 1) * s_stride + c else None
    return None


def like(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y with the strides of `torch.empty_like(x)`: layout in = layout out. Copies only where they differ."""
    target = torch.empty_like(x, dtype=y.dtype)
    return y if y.stride() == target.stride() else target.copy_(y)


def collapse_rows(t: torch.Tensor) -> tuple[int, int] | None:
    """(rows, stride) of t (..., L) read as (rows, L), each row dense; None where no single stride walks the rows."""
    length = t.shape[-1]
    if t.is_contiguous():  # the usual case, without walking the strides
        return t.numel() // length, length
    if length != 1 and t.stride(-1) != 1:
        return None
    rows, stride = 1, length
    first = True
    for size, step in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1])):
        if size == 1:
            continue
        if first:
            stride, first = step, False
        elif step != stride * rows:
            return None
        rows *= size
    return rows, stride


def samples_in_step(*tensors: torch.Tensor) -> bool:
    """Whether tensors (B, …) of one shape can be read together as (B, M), whatever the order in memory is.

    Each sample must be dense, in the same order in every tensor. Samples may be any distance apart (`stride(0)`) that
    keeps them from overlapping, in each tensor another.
    """
    shape = tensors[0].shape
    if all(t.shape == shape and t.is_contiguous() for t in tensors):  # the usual case, without walking the strides
        return True
    strides = _inner_strides(tensors[0])
    # From the innermost dimension out, without sorting: torch.compile does not sort what it does not know.
    size, left = 1, [(step, length) for step, length in zip(strides, shape[1:]) if length > 1]
    while left:
        inner = [dimension for dimension in left if dimension[0] == size]
        if len(inner) != 1:
            return False
        size *= inner[0][1]
        left = [dimension for dimension in left if dimension is not inner[0]]
    batch_strides = [t.stride(0) for t in tensors]
    same_order = all(t.shape == shape and _inner_strides(t) == strides for t in tensors[1:])
    return same_order and (shape[0] <= 1 or all(step >= size for step in batch_strides))


def _inner_strides(t: torch.Tensor) -> list[int]:
    """Of the dimensions behind the first; 0 where a dimension of one element may carry any."""
    return [step if length > 1 else 0 for length, step in zip(t.shape[1:], t.stride()[1:])]
