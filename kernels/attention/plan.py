"""What the plans of the launches have in common."""

from __future__ import annotations

import torch
import triton

from ..launch import Argument
from .tiles import MAX_SLICED, HeadParts, Problem, padded, slices, whole_slice

Arguments = dict[str, Argument]

# No size and no stride is worth a version of its own: alignment is told by `UNIT`, overhang by the masks.
RUNTIME_SIZES = [
    *(f"{name}_stride_{axis}" for name in ("q", "k", "v", "o", "grad_o", "grad_q", "grad_kv") for axis in "bhn"),
    "o_stride_split",
    "lse_stride_split",
    "grad_kv_stride_split",
    "heads",
    "queries",
    "keys",
    "tiles",
    "splits",
    "per_split",
]


def problem_of(q: torch.Tensor, k: torch.Tensor, *others: torch.Tensor) -> Problem:
    """others: every other input."""
    batch, heads, queries, head_dim = q.shape
    inputs = (q, k, *others)
    aligned = stride_unit(*inputs) == 8 and all(t.data_ptr() % 16 == 0 for t in inputs)
    return Problem(batch * heads, queries, k.shape[2], head_dim, q.element_size(), aligned)


def empty_rows(like: torch.Tensor, splits: int = 1) -> torch.Tensor:
    """(B, H, N, D) like `like`, with (B, N, H, D) memory order; with several splits float32 and one more dimension in
    front, each in that order."""
    batch, heads, rows, head_dim = like.shape
    if splits == 1:
        return like.new_empty((batch, rows, heads, head_dim)).transpose(1, 2)
    partial = like.new_empty((splits, batch, rows, heads, head_dim), dtype=torch.float32)
    return partial.transpose(2, 3)


def stride_unit(*tensors: torch.Tensor) -> int:
    """8 where every stride is a multiple of 8 elements, a 16-byte access of a 16-bit type; else 1."""
    return 8 if all(stride % 8 == 0 for t in tensors for stride in t.stride()[:-1]) else 1


def stride_arguments(unit: int, **tensors: torch.Tensor) -> Arguments:
    """`q_stride_b`, `q_stride_h`, `q_stride_n` for a tensor passed as `q`, in units; also `q_stride_split` for one with
    splits in front."""
    arguments: Arguments = {}
    for name, tensor in tensors.items():
        *split, b, h, n, _ = (stride // unit for stride in tensor.stride())
        arguments |= {f"{name}_stride_b": b, f"{name}_stride_h": h, f"{name}_stride_n": n}
        arguments[f"{name}_stride_split"] = split[0] if split else 0
    return arguments


def head_constexprs(problem: Problem, parts: HeadParts, unit: int, dtype: torch.dtype) -> dict[str, object]:
    """What every kernel is compiled for."""
    head_dim = problem.head_dim
    sliced = problem.aligned and head_dim <= MAX_SLICED
    whole, part = map(slices if sliced else whole_slice, (head_dim, parts.width))
    return {
        "D": head_dim,
        "SLICES": whole,
        "MASK_D": padded(whole) != head_dim,
        "PARTS": parts.count,
        "PART": parts.width,
        "PART_SLICES": part,
        "MASK_PART": padded(part) * parts.count != head_dim,
        "UNIT": unit,
        "PRECISION": precision(dtype),
    }


def precision(dtype: torch.dtype) -> str:
    """Of the operands of a product, as `tl.dot` names it; it says nothing about 16-bit ones. "upcast": as float32,
    because Triton's interpreter multiplies the bits of bfloat16 operands as integers.
    """
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return "upcast"
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
