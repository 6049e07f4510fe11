"""GEGLU in Triton: `h * gelu(gate)` with `h, gate = x.chunk(2, -1)`, forward and backward.

GELU: Hendrycks and Gimpel, arXiv 1606.08415; GEGLU: Shazeer, arXiv 2002.05202. With the normal distribution function
Phi and its density phi,

    y = h g Phi(g),     grad_h = grad_y g Phi(g),     grad_g = grad_y h (Phi(g) + g phi(g)).

Both kernels read each element once and write each once. A tile is (rows, columns of one half).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import Launch, Specialisation, run_all, unique_specialisations

__all__ = ["geglu", "geglu_backward", "specialisations"]

NUM_WARPS = 4
# Per thread and tensor, in 16 bits: two 16-byte accesses in flight of each input; one where there are few programs.
ELEMENTS_PER_THREAD = 16
PROGRAMS_PER_WAVE = 1024  # about eight programs on each of 132 multiprocessors
MAX_COLUMNS = 1024
LINE = 64  # columns of a 128-byte line of a 16-bit tensor

# Sizes that decide no alignment are left out of the specialisation: fewer versions to compile.
RUNTIME_SIZES = ["rows", "column_tiles"]


@triton.jit
def _normal(g):
    """Phi(g) and exp(-g^2 / 2), of which the density is 1 / sqrt(2 pi).

    Phi(-a) = exp(-a^2 / 2) R(a) for a >= 0; R(a) = erfcx(a / sqrt(2)) / 2 is a polynomial in t = 1 / (1 + 0.305 a)
    without a constant term (the form of Hastings, 1955), fitted for the smallest largest relative error on [0, 14]:
    9.4e-8. So a far tail keeps its digits, where 1 + erf(g / sqrt(2)) has none below -5, and one exponential serves
    both.
    """
    bell = tl.exp(-0.5 * g * g)
    t = 1.0 / (1.0 + 0.305 * tl.abs(g))
    p = t * 0.03669918 - 0.152988269
    p = p * t + 0.185716829
    p = p * t - 0.0379767611
    p = p * t + 0.121021644
    p = p * t + 0.103420876
    p = p * t + 0.122466815
    p = p * t + 0.121639733
    tail = bell * (p * t)
    return tl.where(g < 0.0, tail, 1.0 - tail), bell


@triton.jit
def _tile(rows, columns, column_tiles, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and columns of this program's tile, in 64 bits, and which of its elements exist."""
    program = tl.program_id(0).to(tl.int64)
    r = program // column_tiles * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = program % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return r, c, (r < rows) & (c < columns)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _forward_kernel(x_ptr, y_ptr, x_stride, rows, columns, column_tiles, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    r, c, mask = _tile(rows, columns, column_tiles, BLOCK_R, BLOCK_C)
    h_ptrs = x_ptr + r * x_stride + c
    h = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(h_ptrs + columns, mask=mask, other=0.0).to(tl.float32)
    cdf, _ = _normal(gate)
    tl.store(y_ptr + r * columns + c, (h * (gate * cdf)).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _backward_kernel(
    grad_y_ptr,
    x_ptr,
    grad_x_ptr,
    grad_y_stride,
    x_stride,
    rows,
    columns,
    column_tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r, c, mask = _tile(rows, columns, column_tiles, BLOCK_R, BLOCK_C)
    h_ptrs = x_ptr + r * x_stride + c
    grad_y = tl.load(grad_y_ptr + r * grad_y_stride + c, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(h_ptrs + columns, mask=mask, other=0.0).to(tl.float32)
    cdf, bell = _normal(gate)
    grad_gate = grad_y * h * (cdf + gate * (bell * 0.398942280))
    grad_h_ptrs = grad_x_ptr + r * (2 * columns) + c
    tl.store(grad_h_ptrs, (grad_y * (gate * cdf)).to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_h_ptrs + columns, grad_gate.to(grad_x_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Tile:
    """What one program works on, chosen from shapes alone."""

    rows: int
    columns: int
    num_warps: int

    @classmethod
    def of(cls, rows: int, columns: int) -> Tile:
        # As wide as hangs over by an eighth at most, but not narrower than a line: 256 for 1280, 1024 for 5120.
        block_c = min(MAX_COLUMNS, triton.next_power_of_2(columns))
        while block_c > LINE and 8 * triton.cdiv(columns, block_c) * block_c > 9 * columns:
            block_c //= 2
        elements = 32 * NUM_WARPS * ELEMENTS_PER_THREAD
        if rows * columns < PROGRAMS_PER_WAVE * elements:
            elements //= 2
        block_r = max(1, min(triton.next_power_of_2(rows), elements // block_c))
        num_warps = max(1, min(NUM_WARPS, block_r * block_c // (32 * ELEMENTS_PER_THREAD // 2)))
        return cls(block_r, block_c, num_warps)

    def launch(self, kernel: triton.JITFunction, rows: int, columns: int, **arguments: torch.Tensor | int) -> Launch:
        column_tiles = triton.cdiv(columns, self.columns)
        return Launch.of(
            kernel,
            programs=triton.cdiv(rows, self.rows) * column_tiles,
            arguments=arguments | {"rows": rows, "columns": columns, "column_tiles": column_tiles},
            constexprs={"BLOCK_R": self.rows, "BLOCK_C": self.columns},
            num_warps=self.num_warps,
        )


def row_stride(tensor: torch.Tensor) -> int:
    """The stride from row to row of a tensor (..., L) whose rows one stride is known to walk."""
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]) if size > 1]
    return strides[-1] if strides else tensor.shape[-1]


def plan_forward(x: torch.Tensor) -> tuple[list[Launch], torch.Tensor]:
    columns = x.shape[-1] // 2
    rows = x.numel() // x.shape[-1]
    y = x.new_empty((*x.shape[:-1], columns))
    launch = Tile.of(rows, columns).launch(_forward_kernel, rows, columns, x_ptr=x, y_ptr=y, x_stride=row_stride(x))
    return [launch], y


def plan_backward(grad_y: torch.Tensor, x: torch.Tensor) -> tuple[list[Launch], torch.Tensor]:
    columns = x.shape[-1] // 2
    rows = x.numel() // x.shape[-1]
    grad_x = torch.empty_like(x)
    launch = Tile.of(rows, columns).launch(
        _backward_kernel,
        rows,
        columns,
        grad_y_ptr=grad_y,
        x_ptr=x,
        grad_x_ptr=grad_x,
        grad_y_stride=row_stride(grad_y),
        x_stride=row_stride(x),
    )
    return [launch], grad_x


def geglu(x: torch.Tensor) -> torch.Tensor:
    """`h * gelu(gate)` with `h, gate = x.chunk(2, -1)`, computed in float32 and rounded once.

    The caller has checked the argument; nothing is checked here.

    Args:
        x: (..., 2D), float32, float16 or bfloat16, at least one row. Rows are dense and one stride walks them, not
            overlapping. On a CUDA device, or on the CPU when the process runs Triton's interpreter
            (TRITON_INTERPRET=1).

    Returns:
        (..., D), dense.
    """
    launches, y = plan_forward(x)
    run_all(launches, x.device)
    return y


def geglu_backward(grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of `geglu` for x, dense; grad_y (..., D) has dense rows that any one stride walks, 0 included."""
    launches, grad_x = plan_backward(grad_y, x)
    run_all(launches, x.device)
    return grad_x


# ---- the ahead-of-time gate -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """One forward and one backward call, on `meta` tensors."""

    rows: int
    columns: int  # of y
    dtype: torch.dtype = torch.bfloat16
    storage_offset: int = 0  # in elements: 1 makes every address unaligned
    row_gap: int = 0  # elements between the rows of x and of grad_y

    def launches(self) -> list[Launch]:
        x, grad_y = self._rows_of(2 * self.columns), self._rows_of(self.columns)
        return plan_forward(x)[0] + plan_backward(grad_y, x)[0]

    def _rows_of(self, length: int) -> torch.Tensor:
        stride = length + self.row_gap
        memory = torch.empty(self.rows * stride + self.storage_offset, dtype=self.dtype, device="meta")
        return memory.as_strided((self.rows, length), (stride, 1), self.storage_offset)


def probes() -> Iterator[Probe]:
    # The feed-forward of SD1.5 and SDXL from its first level to its last, batch 1 and 4.
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, columns in ((4096, 1280), (1024, 2560), (256, 5120), (64, 5120), (16384, 1280), (4096, 5120)):
            yield Probe(rows, columns, dtype)
        yield Probe(1000, 320, dtype)
        yield Probe(77, 1280, dtype, row_gap=64)
    yield Probe(33, 77, torch.float16, storage_offset=1, row_gap=3)
    yield Probe(5, 5001, torch.float32, storage_offset=1)
    yield Probe(5000, 1, torch.bfloat16)
    yield Probe(1, 3, torch.float32)
    yield Probe(700_000, 4096, torch.bfloat16)  # offsets beyond 32 bits


def specialisations() -> list[Specialisation]:
    """Every different version that the probes launch; needs neither a GPU nor the interpreter."""
    return unique_specialisations(launch for probe in probes() for launch in probe.launches())
