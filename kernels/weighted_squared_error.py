"""The weighted squared error in Triton: mean over samples of weight * mean of (x - (scale_a a + scale_b b))^2.

Forward: one program adds up the squares of each tile, and, where there is more than one, another program adds up the
tiles in order. Backward: grad_x = 2 weight grad / numel * (x - (scale_a a + scale_b b)), one launch. A tile is
(samples, elements of a sample in the order of memory).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import Launch, Specialisation, run_all, unique_specialisations

__all__ = ["specialisations", "weighted_squared_error", "weighted_squared_error_backward"]

MAX_ELEMENTS = 4096  # of a tile: 16 per thread of each tensor
MIN_ELEMENTS = 1024  # where tiles are fewer than PROGRAMS
PROGRAMS = 256  # about two for each of 132 multiprocessors
LINE = 64  # elements of a 128-byte line of a 16-bit tensor
COMBINED_AT_ONCE = 1024

# Sizes that decide no alignment are left out of the specialisation: fewer versions to compile.
RUNTIME_SIZES = ["samples", "column_tiles", "scale_a_stride", "scale_b_stride", "weight_stride", "count"]


@triton.jit
def _per_sample(ptr, stride, value, samples, r):
    """What a scale or weight is for the samples r: its tensor's elements, or `value` where there is none."""
    if ptr is None:
        return value
    else:
        return tl.load(ptr + r * stride, mask=r < samples, other=0.0)


@triton.jit
def _difference(
    x_ptr,
    a_ptr,
    b_ptr,
    scale_a_ptr,
    scale_b_ptr,
    x_stride,
    a_stride,
    b_stride,
    scale_a_stride,
    scale_b_stride,
    value_a,
    value_b,
    samples,
    r,
    c,
    mask,
):
    """x - (scale_a a + scale_b b) of a tile in float32, 0 outside of it: an infinite scale makes NaN of a padded 0."""
    target = _per_sample(scale_a_ptr, scale_a_stride, value_a, samples, r) * tl.load(
        a_ptr + r * a_stride + c, mask=mask, other=0.0
    ).to(tl.float32)
    if b_ptr is not None:
        target += _per_sample(scale_b_ptr, scale_b_stride, value_b, samples, r) * tl.load(
            b_ptr + r * b_stride + c, mask=mask, other=0.0
        ).to(tl.float32)
    x = tl.load(x_ptr + r * x_stride + c, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, x - target, 0.0)


@triton.jit
def _tile(samples, columns, column_tiles, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Samples and elements of this program's tile, in 64 bits, and which of them exist."""
    program = tl.program_id(0).to(tl.int64)
    r = program // column_tiles * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = program % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return r, c, (r < samples) & (c < columns)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _forward_kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    scale_a_ptr,
    scale_b_ptr,
    weight_ptr,
    sums_ptr,
    x_stride,
    a_stride,
    b_stride,
    scale_a_stride,
    scale_b_stride,
    weight_stride,
    value_a,
    value_b,
    value_weight,
    mean,
    samples,
    columns,
    column_tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r, c, mask = _tile(samples, columns, column_tiles, BLOCK_R, BLOCK_C)
    d = _difference(
        x_ptr, a_ptr, b_ptr, scale_a_ptr, scale_b_ptr, x_stride, a_stride, b_stride, scale_a_stride, scale_b_stride,
        value_a, value_b, samples, r, c, mask,
    )  # fmt: skip
    squares = tl.sum(d * d, axis=1, keep_dims=True)
    weighted = squares * _per_sample(weight_ptr, weight_stride, value_weight, samples, r)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.sum(weighted, axis=1), axis=0) * mean)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _combine_kernel(sums_ptr, loss_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + i, mask=i < count, other=0.0)
    tl.store(loss_ptr, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _backward_kernel(
    grad_ptr,
    x_ptr,
    a_ptr,
    b_ptr,
    scale_a_ptr,
    scale_b_ptr,
    weight_ptr,
    grad_x_ptr,
    x_stride,
    a_stride,
    b_stride,
    scale_a_stride,
    scale_b_stride,
    weight_stride,
    value_a,
    value_b,
    value_weight,
    mean,
    samples,
    columns,
    column_tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r, c, mask = _tile(samples, columns, column_tiles, BLOCK_R, BLOCK_C)
    d = _difference(
        x_ptr, a_ptr, b_ptr, scale_a_ptr, scale_b_ptr, x_stride, a_stride, b_stride, scale_a_stride, scale_b_stride,
        value_a, value_b, samples, r, c, mask,
    )  # fmt: skip
    outer = 2.0 * mean * tl.load(grad_ptr) * _per_sample(weight_ptr, weight_stride, value_weight, samples, r)
    tl.store(grad_x_ptr + r * columns + c, (outer * d).to(grad_x_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Tile:
    """What one program works on, chosen from shapes alone."""

    samples: int
    columns: int
    num_warps: int

    @classmethod
    def of(cls, samples: int, columns: int) -> Tile:
        elements = MAX_ELEMENTS
        while elements > MIN_ELEMENTS and samples * columns < PROGRAMS * elements:
            elements //= 2
        # As wide as hangs over by an eighth at most, but not narrower than a line: 4096 for 16384, 512 for 12285.
        block_c = min(elements, triton.next_power_of_2(columns))
        while block_c > LINE and 8 * triton.cdiv(columns, block_c) * block_c > 9 * columns:
            block_c //= 2
        block_r = max(1, min(triton.next_power_of_2(samples), elements // block_c))
        return cls(block_r, block_c, max(1, min(8, block_r * block_c // 256)))


def _plan(kernel, x, a, b, scale_a, scale_b, weight, value_a, value_b, value_weight, **more) -> Launch:
    samples = x.shape[0]
    columns = x.numel() // samples
    tile = Tile.of(samples, columns)
    column_tiles = triton.cdiv(columns, tile.columns)
    tensors = {"x": x, "a": a, "b": b, "scale_a": scale_a, "scale_b": scale_b, "weight": weight}
    pointers = {f"{name}_ptr": t for name, t in tensors.items()}
    strides = {f"{name}_stride": 0 if t is None else t.stride(0) for name, t in tensors.items()}
    values = {"value_a": float(value_a), "value_b": float(value_b), "value_weight": float(value_weight)}
    sizes = {"samples": samples, "columns": columns, "column_tiles": column_tiles, "mean": 1.0 / x.numel()}
    return Launch.of(
        kernel,
        programs=triton.cdiv(samples, tile.samples) * column_tiles,
        arguments=pointers | strides | values | sizes | more,
        constexprs={"BLOCK_R": tile.samples, "BLOCK_C": tile.columns},
        num_warps=tile.num_warps,
    )


def plan_forward(x: torch.Tensor, *call) -> tuple[list[Launch], torch.Tensor]:
    loss = x.new_empty((), dtype=torch.float32)
    programs = _plan(_forward_kernel, x, *call, sums_ptr=loss).programs
    if programs == 1:
        return [_plan(_forward_kernel, x, *call, sums_ptr=loss)], loss
    sums = x.new_empty((programs,), dtype=torch.float32)
    combine = Launch.of(
        _combine_kernel,
        programs=1,
        arguments={"sums_ptr": sums, "loss_ptr": loss, "count": programs},
        constexprs={"BLOCK": COMBINED_AT_ONCE},
        num_warps=8,
    )
    return [_plan(_forward_kernel, x, *call, sums_ptr=sums), combine], loss


def plan_backward(grad: torch.Tensor, x: torch.Tensor, *call) -> tuple[list[Launch], torch.Tensor]:
    grad_x = torch.empty_like(x)
    return [_plan(_backward_kernel, x, *call, grad_ptr=grad, grad_x_ptr=grad_x)], grad_x


def weighted_squared_error(x: torch.Tensor, *call) -> torch.Tensor:
    """The loss () in float32.

    The caller has checked the arguments; nothing is checked here. They are those of the registered op:

    x, a, b: (B, ...), at least one element, float32, float16 or bfloat16 each; samples dense, in one memory order, any
        distance apart. b may be None. On a CUDA device, or on the CPU when the process runs Triton's interpreter.
    scale_a, scale_b, weight: (B,) float32 of any stride, or None where the value holds for all.
    value_a, value_b, value_weight: floats.
    """
    launches, loss = plan_forward(x, *call)
    run_all(launches, x.device)
    return loss


def weighted_squared_error_backward(grad: torch.Tensor, x: torch.Tensor, *call) -> torch.Tensor:
    """x's gradient, with the strides of `torch.empty_like(x)`; grad: () float32, the loss's."""
    launches, grad_x = plan_backward(grad, x, *call)
    run_all(launches, x.device)
    return grad_x


# ---- the ahead-of-time gate -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """One forward and one backward call, on `meta` tensors."""

    samples: int
    columns: int
    dtype: torch.dtype = torch.float32
    target: torch.dtype = torch.float32
    two: bool = False  # whether there is a b
    scaled: bool = False  # whether the scales and the weight are tensors
    storage_offset: int = 0  # in elements: 1 makes every address unaligned
    gap: int = 0  # elements between the samples

    def launches(self) -> list[Launch]:
        x, a, b = (self._tensor(dtype) for dtype in (self.dtype, self.target, self.target))
        scale = torch.empty(self.samples, device="meta")
        scales = (scale, scale if self.two else None, scale) if self.scaled else (None,) * 3
        call = (x, a, b if self.two else None, *scales, 1.0, 1.0, 1.0)
        return plan_forward(*call)[0] + plan_backward(torch.empty((), device="meta"), *call)[0]

    def _tensor(self, dtype: torch.dtype) -> torch.Tensor:
        stride = self.columns + self.gap
        memory = torch.empty(self.samples * stride + self.storage_offset, dtype=dtype, device="meta")
        return memory.as_strided((self.samples, self.columns), (stride, 1), self.storage_offset)


def probes() -> Iterator[Probe]:
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    latents, pixels = (8, 4 * 64 * 64), (2, 3 * 512 * 512)  # at 512 px
    for dtype, target in ((f32, f32), (bf16, f32), (bf16, bf16)):
        for shape in (latents, pixels):
            yield Probe(*shape, dtype, target, scaled=True)
            yield Probe(*shape, dtype, target, two=True)
        yield Probe(*pixels, dtype, target, two=True, scaled=True)
    for dtype, target in ((f16, f32), (f16, f16), (f32, bf16)):
        yield Probe(*pixels, dtype, target, two=True, scaled=True)
    yield Probe(3, 4 * 65 * 63, f32, bf16, two=True, scaled=True, storage_offset=1, gap=3)
    yield Probe(2, 3 * 512 * 512 - 1, f16, bf16, scaled=True)
    yield Probe(70_000, 2, f32, f32, two=True)  # points of a plane
    yield Probe(1, 1)
    yield Probe(1000, 4 * 1024 * 1024, bf16, bf16, scaled=True)  # offsets beyond 32 bits


def specialisations() -> list[Specialisation]:
    """Every different version that the probes launch; needs neither a GPU nor the interpreter."""
    return unique_specialisations(launch for probe in probes() for launch in probe.launches())
