"""The head of LPIPS in Triton: unit vectors over channels, squared difference, weighted sum, mean over pixels.

Zhang et al., arXiv 1801.03924, equation 1. With u = x / (|x| + eps), v likewise of y, delta = u - v, S pixels:

    d = 1/S sum_s sum_c w delta^2
    grad_x = 2 grad / S (w delta / (|x| + eps) - u / |x| sum_c(w delta u)),     grad_weight = grad / S sum_s delta^2

A tile is (channels, pixels) whatever the layout: Triton compiles a stride of 1 into the kernel and knows from it along
which dimension addresses are contiguous. Where a tile holds all channels each value is read once; otherwise the
channels are walked twice forward (norms, differences) and three times backward, and what was read is still in the
caches. Programs leave partial sums, which are added up in order: nothing is atomic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import Launch, Specialisation, run_all, unique_specialisations

__all__ = ["lpips_distance", "lpips_distance_backward", "specialisations"]

NUM_WARPS = 4
ELEMENTS = 2048  # of a tile: 16 per thread and tensor
RUN = 32  # pixels side by side where they are contiguous: a 64-byte piece of a line in 16 bits
LEAST_RUN = 16  # a 32-byte sector, where there are few programs
PROGRAMS_PER_WAVE = 512  # about four programs on each of 132 multiprocessors
MAX_CHANNELS = 1024  # of a tile

# Sizes that decide no alignment are left out of the specialisation: fewer versions to compile.
RUNTIME_SIZES = ["tiles", "grad_stride", "weight_stride"]


@triton.jit
def _reciprocals(squares):
    """1 / (norm + eps) and 1 / norm from a sum of squares; both 0 for a vector of zeros, which has no direction."""
    norm = tl.sqrt(tl.where(squares == 0.0, 1.0, squares))
    return tl.where(squares == 0.0, 0.0, 1.0 / (norm + 1e-10)), tl.where(squares == 0.0, 0.0, 1.0 / norm)


@triton.jit
def _load(ptr, c0, channels, c_stride, s, pixels, s_stride, BLOCK_C: tl.constexpr):
    c = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask = (c < channels)[:, None] & (s < pixels)[None, :]
    return tl.load(ptr + c[:, None] * c_stride + s[None, :] * s_stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_weight(ptr, c0, channels, stride, BLOCK_C: tl.constexpr):
    c = c0 + tl.arange(0, BLOCK_C)
    return tl.load(ptr + c * stride, mask=c < channels, other=0.0)[:, None]


@triton.jit
def _store(ptr, value, c0, channels, c_stride, s, pixels, s_stride, BLOCK_C: tl.constexpr):
    c = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask = (c < channels)[:, None] & (s < pixels)[None, :]
    tl.store(ptr + c[:, None] * c_stride + s[None, :] * s_stride, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _forward_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    partial_ptr,
    x_n,
    x_c,
    x_s,
    y_n,
    y_c,
    y_s,
    weight_stride,
    channels,
    pixels,
    tiles,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WHOLE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    s = program % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    x_ptr += sample * x_n
    y_ptr += sample * y_n
    if WHOLE:
        x = _load(x_ptr, 0, channels, x_c, s, pixels, x_s, BLOCK_C)
        y = _load(y_ptr, 0, channels, y_c, s, pixels, y_s, BLOCK_C)
        rx, _ = _reciprocals(tl.sum(x * x, 0))
        ry, _ = _reciprocals(tl.sum(y * y, 0))
        delta = x * rx[None, :] - y * ry[None, :]
        total = tl.sum(_load_weight(weight_ptr, 0, channels, weight_stride, BLOCK_C) * delta * delta, 0)
    else:
        xx = tl.zeros((BLOCK_S,), tl.float32)
        yy = tl.zeros((BLOCK_S,), tl.float32)
        for c0 in range(0, channels, BLOCK_C):
            x = _load(x_ptr, c0, channels, x_c, s, pixels, x_s, BLOCK_C)
            y = _load(y_ptr, c0, channels, y_c, s, pixels, y_s, BLOCK_C)
            xx += tl.sum(x * x, 0)
            yy += tl.sum(y * y, 0)
        rx, _ = _reciprocals(xx)
        ry, _ = _reciprocals(yy)
        total = tl.zeros((BLOCK_S,), tl.float32)
        for c0 in range(0, channels, BLOCK_C):
            x = _load(x_ptr, c0, channels, x_c, s, pixels, x_s, BLOCK_C)
            y = _load(y_ptr, c0, channels, y_c, s, pixels, y_s, BLOCK_C)
            delta = x * rx[None, :] - y * ry[None, :]
            total += tl.sum(_load_weight(weight_ptr, c0, channels, weight_stride, BLOCK_C) * delta * delta, 0)
    tl.store(partial_ptr + program, tl.sum(total, 0) / pixels)


@triton.jit
def _store_gradients(
    x,
    y,
    rx,
    ry,
    x_sum,
    y_sum,
    scale,
    weight,
    to_x_ptr,
    to_y_ptr,
    c0,
    channels,
    s,
    pixels,
    to_x_c,
    to_x_s,
    to_y_c,
    to_y_s,
    BLOCK_C: tl.constexpr,
):
    """x_sum, y_sum: sum_c(w delta u) / |x|, sum_c(w delta v) / |y|."""
    u, v = x * rx[None, :], y * ry[None, :]
    weighted = weight * (u - v)
    if to_x_ptr is not None:
        gradient = scale * (weighted * rx[None, :] - u * x_sum[None, :])
        _store(to_x_ptr, gradient, c0, channels, to_x_c, s, pixels, to_x_s, BLOCK_C)
    if to_y_ptr is not None:
        gradient = scale * (v * y_sum[None, :] - weighted * ry[None, :])
        _store(to_y_ptr, gradient, c0, channels, to_y_c, s, pixels, to_y_s, BLOCK_C)


@triton.jit
def _store_squares(ptr, delta, scale, program, c0, channels, BLOCK_C: tl.constexpr):
    c = c0 + tl.arange(0, BLOCK_C)
    tl.store(ptr + program * channels + c, scale * 0.5 * tl.sum(delta * delta, 1), mask=c < channels)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _backward_kernel(
    grad_ptr,
    x_ptr,
    y_ptr,
    weight_ptr,
    to_x_ptr,
    to_y_ptr,
    to_weight_ptr,
    grad_stride,
    x_n,
    x_c,
    x_s,
    y_n,
    y_c,
    y_s,
    to_x_n,
    to_x_c,
    to_x_s,
    to_y_n,
    to_y_c,
    to_y_s,
    weight_stride,
    channels,
    pixels,
    tiles,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WHOLE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    s = program % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    x_ptr += sample * x_n
    y_ptr += sample * y_n
    if to_x_ptr is not None:
        to_x_ptr += sample * to_x_n
    if to_y_ptr is not None:
        to_y_ptr += sample * to_y_n
    scale = 2.0 * tl.load(grad_ptr + sample * grad_stride) / pixels
    if WHOLE:
        x = _load(x_ptr, 0, channels, x_c, s, pixels, x_s, BLOCK_C)
        y = _load(y_ptr, 0, channels, y_c, s, pixels, y_s, BLOCK_C)
        weight = _load_weight(weight_ptr, 0, channels, weight_stride, BLOCK_C)
        rx, x_slope = _reciprocals(tl.sum(x * x, 0))
        ry, y_slope = _reciprocals(tl.sum(y * y, 0))
        u, v = x * rx[None, :], y * ry[None, :]
        x_sum = tl.sum(weight * (u - v) * u, 0) * x_slope
        y_sum = tl.sum(weight * (u - v) * v, 0) * y_slope
        if to_weight_ptr is not None:
            _store_squares(to_weight_ptr, u - v, scale, program, 0, channels, BLOCK_C)
        _store_gradients(
            x,
            y,
            rx,
            ry,
            x_sum,
            y_sum,
            scale,
            weight,
            to_x_ptr,
            to_y_ptr,
            0,
            channels,
            s,
            pixels,
            to_x_c,
            to_x_s,
            to_y_c,
            to_y_s,
            BLOCK_C,
        )
    else:
        xx = tl.zeros((BLOCK_S,), tl.float32)
        yy = tl.zeros((BLOCK_S,), tl.float32)
        for c0 in range(0, channels, BLOCK_C):
            x = _load(x_ptr, c0, channels, x_c, s, pixels, x_s, BLOCK_C)
            y = _load(y_ptr, c0, channels, y_c, s, pixels, y_s, BLOCK_C)
            xx += tl.sum(x * x, 0)
            yy += tl.sum(y * y, 0)
        rx, x_slope = _reciprocals(xx)
        ry, y_slope = _reciprocals(yy)
        x_sum = tl.zeros((BLOCK_S,), tl.float32)
        y_sum = tl.zeros((BLOCK_S,), tl.float32)
        for c0 in range(0, channels, BLOCK_C):
            u = _load(x_ptr, c0, channels, x_c, s, pixels, x_s, BLOCK_C) * rx[None, :]
            v = _load(y_ptr, c0, channels, y_c, s, pixels, y_s, BLOCK_C) * ry[None, :]
            weighted = _load_weight(weight_ptr, c0, channels, weight_stride, BLOCK_C) * (u - v)
            x_sum += tl.sum(weighted * u, 0)
            y_sum += tl.sum(weighted * v, 0)
            if to_weight_ptr is not None:
                _store_squares(to_weight_ptr, u - v, scale, program, c0, channels, BLOCK_C)
        x_sum *= x_slope
        y_sum *= y_slope
        for c0 in range(0, channels, BLOCK_C):
            x = _load(x_ptr, c0, channels, x_c, s, pixels, x_s, BLOCK_C)
            y = _load(y_ptr, c0, channels, y_c, s, pixels, y_s, BLOCK_C)
            _store_gradients(
                x,
                y,
                rx,
                ry,
                x_sum,
                y_sum,
                scale,
                _load_weight(weight_ptr, c0, channels, weight_stride, BLOCK_C),
                to_x_ptr,
                to_y_ptr,
                c0,
                channels,
                s,
                pixels,
                to_x_c,
                to_x_s,
                to_y_c,
                to_y_s,
                BLOCK_C,
            )


@dataclass(frozen=True)
class Tile:
    """What one program works on, chosen from shapes and strides alone."""

    channels: int
    pixels: int
    whole: bool  # holds all channels
    num_warps: int

    @classmethod
    def of(cls, samples: int, channels: int, pixels: int, *, rows: bool) -> Tile:
        """rows: a pixel's channels lie side by side."""
        padded = triton.next_power_of_2(channels)
        if rows:
            block_c = min(padded, MAX_CHANNELS)
            block_s = min(max(1, ELEMENTS // block_c), triton.next_power_of_2(pixels))
        else:
            few = samples * triton.cdiv(pixels, RUN) < PROGRAMS_PER_WAVE
            block_s = min(LEAST_RUN if few else RUN, triton.next_power_of_2(pixels))
            block_c = min(padded, max(1, ELEMENTS // block_s))
        num_warps = max(1, min(NUM_WARPS, block_c * block_s // 256))
        return cls(block_c, block_s, block_c >= channels, num_warps)

    def launch(self, kernel: triton.JITFunction, x: torch.Tensor, **arguments: torch.Tensor | int | None) -> Launch:
        samples, channels, pixels = _sizes(x)
        tiles = triton.cdiv(pixels, self.pixels)
        return Launch.of(
            kernel,
            programs=samples * tiles,
            arguments=arguments | {"channels": channels, "pixels": pixels, "tiles": tiles},
            constexprs={"BLOCK_C": self.channels, "BLOCK_S": self.pixels, "WHOLE": self.whole},
            num_warps=self.num_warps,
            fuse=False,  # fused into the subtraction, x rx would differ from y ry where x is y
        )


def _sizes(x: torch.Tensor) -> tuple[int, int, int]:
    samples, channels = x.shape[:2]
    return samples, channels, x.shape[2:].numel()


def _strides(t: torch.Tensor | None, name: str) -> dict[str, int]:
    """Of (B, C, *spatial) read as (B, C, S), whose spatial dimensions one stride is known to walk."""
    if t is None:
        return dict.fromkeys((f"{name}_n", f"{name}_c", f"{name}_s"), 0)
    spatial = [stride for size, stride in zip(t.shape[2:], t.stride()[2:]) if size > 1]
    return {f"{name}_n": t.stride(0), f"{name}_c": t.stride(1), f"{name}_s": spatial[-1] if spatial else 1}


def _tile(x: torch.Tensor, y: torch.Tensor) -> Tile:
    return Tile.of(*_sizes(x), rows=x.stride(1) == 1 and y.stride(1) == 1)


def plan_forward(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> tuple[list[Launch], torch.Tensor]:
    """The launches, and what they write: (B, tiles), to be added up over the tiles."""
    tile = _tile(x, y)
    samples, _, pixels = _sizes(x)
    partial = x.new_empty((samples, triton.cdiv(pixels, tile.pixels)), dtype=torch.float32)
    launch = tile.launch(
        _forward_kernel,
        x,
        x_ptr=x,
        y_ptr=y,
        weight_ptr=weight,
        partial_ptr=partial,
        weight_stride=weight.stride(0),
        **_strides(x, "x"),
        **_strides(y, "y"),
    )
    return [launch], partial


def plan_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    of_x: bool,
    of_y: bool,
    of_weight: bool,
) -> tuple[list[Launch], tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
    """The launches, and what they write: the gradients of x and y, and that of weight as (programs, C), to be added up;
    None for what is not asked for."""
    tile = _tile(x, y)
    samples, channels, pixels = _sizes(x)
    to_x = torch.empty_like(x) if of_x else None
    to_y = torch.empty_like(y) if of_y else None
    programs = samples * triton.cdiv(pixels, tile.pixels)
    to_weight = x.new_empty((programs, channels), dtype=torch.float32) if of_weight else None
    launch = tile.launch(
        _backward_kernel,
        x,
        grad_ptr=grad,
        x_ptr=x,
        y_ptr=y,
        weight_ptr=weight,
        to_x_ptr=to_x,
        to_y_ptr=to_y,
        to_weight_ptr=to_weight,
        grad_stride=grad.stride(0),
        weight_stride=weight.stride(0),
        **_strides(x, "x"),
        **_strides(y, "y"),
        **_strides(to_x, "to_x"),
        **_strides(to_y, "to_y"),
    )
    return [launch], (to_x, to_y, to_weight)


def lpips_distance(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The distance of each sample, (B,) float32. The caller has checked the arguments; nothing is checked here.

    Args:
        x, y: (B, C, *spatial) of one shape and dtype (float32, float16, bfloat16), at least one sample, each with one
            stride that walks its pixels. On a CUDA device, or on the CPU when the process runs Triton's interpreter
            (TRITON_INTERPRET=1).
        weight: (C,) float32.
    """
    launches, partial = plan_forward(x, y, weight)
    run_all(launches, x.device)
    return partial.sum(1)


def lpips_distance_backward(
    grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, of_x: bool, of_y: bool, of_weight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, y and weight for grad (B,) float32; without elements where not asked for."""
    launches, (to_x, to_y, to_weight) = plan_backward(grad, x, y, weight, of_x, of_y, of_weight)
    run_all(launches, x.device)
    return (
        x.new_empty((0,)) if to_x is None else to_x,
        y.new_empty((0,)) if to_y is None else to_y,
        weight.new_empty((0,)) if to_weight is None else to_weight.sum(0),
    )


# ---- the ahead-of-time gate -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """One forward and one backward call, on `meta` tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    layouts: str = "cc"  # of x and y: "c" contiguous, "l" channels last
    asked: tuple[bool, bool, bool] = (True, False, False)
    storage_offset: int = 0  # in elements: 1 makes every address unaligned

    def launches(self) -> list[Launch]:
        x, y = (self._image(layout) for layout in self.layouts)
        weight = torch.empty(self.shape[1], device="meta")
        grad = torch.empty(self.shape[0], device="meta")
        return plan_forward(x, y, weight)[0] + plan_backward(grad, x, y, weight, *self.asked)[0]

    def _image(self, layout: str) -> torch.Tensor:
        size = torch.Size(self.shape).numel()
        memory = torch.empty(size + self.storage_offset, dtype=self.dtype, device="meta")[self.storage_offset :]
        if layout == "c":
            return memory.view(self.shape)
        samples, channels, *spatial = self.shape
        return memory.view(samples, *spatial, channels).movedim(-1, 1)


def probes() -> Iterator[Probe]:
    # Layers of VGG16; all gradients at once is what takes the most registers.
    every = (True, True, True)
    for layouts in ("cc", "ll"):
        yield Probe((1, 64, 512, 512), torch.bfloat16, layouts)
        yield Probe((1, 512, 32, 32), torch.bfloat16, layouts, every)
        yield Probe((8, 256, 128, 128), torch.float32, layouts, every)
        yield Probe((2, 64, 128, 128), torch.float32, layouts, every)
    yield Probe((2, 128, 64, 64), torch.float16, "cl", every)
    yield Probe((3, 5, 7, 9), torch.float32, "cc", every, storage_offset=1)
    yield Probe((2, 3000, 5, 5), torch.bfloat16, "ll", every)
    yield Probe((1, 1, 1, 1), torch.float32)
    yield Probe((200, 64, 512, 512), torch.bfloat16)  # offsets beyond 32 bits


def specialisations() -> list[Specialisation]:
    """Every different version that the probes launch; needs neither a GPU nor the interpreter."""
    return unique_specialisations(launch for probe in probes() for launch in probe.launches())
