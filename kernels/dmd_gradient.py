"""DMD's gradient in Triton: guidance, conversion to data, normaliser, guard, gradient, loss and statistics.

Yin et al., arXiv 2311.18828, equations 7 and 8. With mu = u x_t + v pred,

    normaliser = mean |x - mu_real|,     g = v (pred_fake - pred_real) / normaliser.

A sample that fits into one program's registers is read once, by one program; a longer one is cut into tiles, whose
predictions are read twice. Partial sums lie in a workspace and a last, small launch adds them in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import Launch, Specialisation, run_all, unique_specialisations

__all__ = ["dmd_gradient", "dmd_gradient_backward", "specialisations"]

MAX_WHOLE = 16384  # elements that one program keeps
MAX_WHOLE_UNALIGNED = 8192  # single elements need a register each for their addresses: 16384 spill 128 bytes per thread
ELEMENTS_PER_WARP = 1024
TILE, TILE_WARPS = 2048, 8  # with 4 warps unaligned float32 spills 8 bytes per thread
FINISH, FINISH_WARPS = 1024, 8  # partial sums that are added at once

# Sizes that decide no alignment are left out of the specialisation: fewer versions to compile.
RUNTIME_SIZES = ["tiles", "partials"]


@triton.jit
def _to_data(sample, alpha_ptr, sigma_ptr, alpha_stride, sigma_stride, alpha, sigma, a, a_sigma, b, b_alpha):
    """(u, v) by Cramer's rule; a network says (a + a_sigma sigma) data + (b + b_alpha alpha) noise."""
    if alpha_ptr is not None:
        alpha = tl.load(alpha_ptr + sample * alpha_stride)
    if sigma_ptr is not None:
        sigma = tl.load(sigma_ptr + sample * sigma_stride)
    of_data = a + a_sigma * sigma
    of_noise = b + b_alpha * alpha
    determinant = alpha * of_noise - sigma * of_data
    return of_noise / determinant, -sigma / determinant


@triton.jit
def _real(cond_ptr, uncond_ptr, at_cond, at_uncond, guidance_scale, mask):
    real = tl.load(cond_ptr + at_cond, mask=mask, other=0.0).to(tl.float32)
    if uncond_ptr is not None:
        uncond = tl.load(uncond_ptr + at_uncond, mask=mask, other=0.0).to(tl.float32)
        real = uncond + guidance_scale * (real - uncond)
    return real


@triton.jit
def _distance(x_ptr, x_t_ptr, at_x, at_x_t, real, u, v, mask):
    """Sum of |x - mu_real| over a tile."""
    x = tl.load(x_ptr + at_x, mask=mask, other=0.0).to(tl.float32)
    mu = v * real
    if x_t_ptr is not None:
        mu += u * tl.load(x_t_ptr + at_x_t, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(tl.where(mask, tl.abs(x - mu), 0.0))


@triton.jit
def _factor(total, elements, v, BOUND: tl.constexpr):
    """The normaliser, and what a sample's differences are multiplied with: NaN where it is guarded."""
    normaliser = total / elements
    usable = (normaliser >= BOUND) & (normaliser - normaliser == 0.0)
    return normaliser, tl.where(usable, v / normaliser, float("nan"))


@triton.jit
def _store_gradient(gradient_ptr, partial_ptr, partials, at, index, factor, difference, scale, mask):
    """scale * g, g = factor * difference, 0 where that is not finite, and the tile's three sums over g."""
    g = factor * difference
    finite = g - g == 0.0
    g = tl.where(finite & mask, g, 0.0)
    tl.store(partial_ptr + index, tl.sum(g * g))
    tl.store(partial_ptr + partials + index, tl.sum(tl.abs(g)))
    tl.store(partial_ptr + 2 * partials + index, tl.sum(tl.where(mask & (finite == 0), 1.0, 0.0)))
    tl.store(gradient_ptr + at, scale * g, mask=mask)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _whole_kernel(
    x_ptr,
    x_t_ptr,
    real_ptr,
    fake_ptr,
    uncond_ptr,
    alpha_ptr,
    sigma_ptr,
    gradient_ptr,
    normaliser_ptr,
    partial_ptr,
    x_stride,
    x_t_stride,
    real_stride,
    fake_stride,
    uncond_stride,
    alpha_stride,
    sigma_stride,
    alpha,
    sigma,
    a,
    a_sigma,
    b,
    b_alpha,
    guidance_scale,
    scale,
    elements,
    sample_stride,
    partials,
    BOUND: tl.constexpr,
    OF_DATA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < elements
    u, v = 0.0, 1.0
    if not OF_DATA:
        u, v = _to_data(sample, alpha_ptr, sigma_ptr, alpha_stride, sigma_stride, alpha, sigma, a, a_sigma, b, b_alpha)
    real = _real(real_ptr, uncond_ptr, sample * real_stride + i, sample * uncond_stride + i, guidance_scale, mask)
    difference = tl.load(fake_ptr + sample * fake_stride + i, mask=mask, other=0.0).to(tl.float32) - real
    total = _distance(x_ptr, x_t_ptr, sample * x_stride + i, sample * x_t_stride + i, real, u, v, mask)
    normaliser, factor = _factor(total, elements, v, BOUND)
    tl.store(normaliser_ptr + sample, normaliser)
    _store_gradient(
        gradient_ptr, partial_ptr, partials, sample * sample_stride + i, sample, factor, difference, scale, mask
    )


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _distance_kernel(
    x_ptr,
    x_t_ptr,
    real_ptr,
    uncond_ptr,
    alpha_ptr,
    sigma_ptr,
    distance_ptr,
    x_stride,
    x_t_stride,
    real_stride,
    uncond_stride,
    alpha_stride,
    sigma_stride,
    alpha,
    sigma,
    a,
    a_sigma,
    b,
    b_alpha,
    guidance_scale,
    elements,
    tiles,
    OF_DATA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    i = program % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = i < elements
    u, v = 0.0, 1.0
    if not OF_DATA:
        u, v = _to_data(sample, alpha_ptr, sigma_ptr, alpha_stride, sigma_stride, alpha, sigma, a, a_sigma, b, b_alpha)
    real = _real(real_ptr, uncond_ptr, sample * real_stride + i, sample * uncond_stride + i, guidance_scale, mask)
    total = _distance(x_ptr, x_t_ptr, sample * x_stride + i, sample * x_t_stride + i, real, u, v, mask)
    tl.store(distance_ptr + program, total)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _gradient_kernel(
    real_ptr,
    fake_ptr,
    uncond_ptr,
    alpha_ptr,
    sigma_ptr,
    gradient_ptr,
    normaliser_ptr,
    distance_ptr,
    partial_ptr,
    real_stride,
    fake_stride,
    uncond_stride,
    alpha_stride,
    sigma_stride,
    alpha,
    sigma,
    a,
    a_sigma,
    b,
    b_alpha,
    guidance_scale,
    scale,
    elements,
    sample_stride,
    tiles,
    partials,
    BOUND: tl.constexpr,
    OF_DATA: tl.constexpr,
    BLOCK: tl.constexpr,
    FINISH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    tile = program % tiles
    i = tile * BLOCK + tl.arange(0, BLOCK)
    mask = i < elements
    v = 1.0
    if not OF_DATA:
        _, v = _to_data(sample, alpha_ptr, sigma_ptr, alpha_stride, sigma_stride, alpha, sigma, a, a_sigma, b, b_alpha)
    totals = tl.zeros([FINISH], tl.float32)
    for first in range(0, tiles, FINISH):
        t = first + tl.arange(0, FINISH)
        totals += tl.load(distance_ptr + sample * tiles + t, mask=t < tiles, other=0.0)
    normaliser, factor = _factor(tl.sum(totals), elements, v, BOUND)
    if tile == 0:
        tl.store(normaliser_ptr + sample, normaliser)
    real = _real(real_ptr, uncond_ptr, sample * real_stride + i, sample * uncond_stride + i, guidance_scale, mask)
    difference = tl.load(fake_ptr + sample * fake_stride + i, mask=mask, other=0.0).to(tl.float32) - real
    _store_gradient(
        gradient_ptr, partial_ptr, partials, sample * sample_stride + i, program, factor, difference, scale, mask
    )


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _finish_kernel(partial_ptr, loss_ptr, grad_abs_mean_ptr, guarded_ptr, numel, partials, FINISH: tl.constexpr):
    squares = tl.zeros([FINISH], tl.float32)
    magnitudes = tl.zeros([FINISH], tl.float32)
    guarded = tl.zeros([FINISH], tl.int64)  # a tile's count is exact in float32, their sum need not be
    for first in range(0, partials, FINISH):
        t = first + tl.arange(0, FINISH).to(tl.int64)
        squares += tl.load(partial_ptr + t, mask=t < partials, other=0.0)
        magnitudes += tl.load(partial_ptr + partials + t, mask=t < partials, other=0.0)
        guarded += tl.load(partial_ptr + 2 * partials + t, mask=t < partials, other=0.0).to(tl.int64)
    tl.store(loss_ptr, 0.5 * tl.sum(squares) / numel)
    tl.store(grad_abs_mean_ptr, tl.sum(magnitudes) / numel)
    tl.store(guarded_ptr, tl.sum(guarded))


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _backward_kernel(grad_loss_ptr, gradient_ptr, grad_x_ptr, numel, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    factor = tl.load(grad_loss_ptr)
    g = tl.load(gradient_ptr + i, mask=mask, other=0.0)
    tl.store(grad_x_ptr + i, (g * factor).to(grad_x_ptr.dtype.element_ty), mask=mask)


BOUND = 1e-6  # NORMALISER_BOUND of fastdistill.ops.dmd_gradient


def _aligned(elements: int, *tensors: torch.Tensor | None) -> bool:
    present = [t for t in tensors if t is not None]
    return elements % 16 == 0 and all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 for t in present)


def plan_forward(
    x: torch.Tensor,
    x_t: torch.Tensor | None,
    pred_real: torch.Tensor,
    pred_fake: torch.Tensor,
    pred_real_uncond: torch.Tensor | None,
    alpha: torch.Tensor | None,
    sigma: torch.Tensor | None,
    alpha_value: float,
    sigma_value: float,
    a: float,
    a_sigma: float,
    b: float,
    b_alpha: float,
    guidance_scale: float,
    scale: float,
) -> tuple[list[Launch], tuple[torch.Tensor, ...]]:
    samples = x.shape[0]
    elements = x.numel() // samples
    gradient = torch.empty_strided(x.shape, (elements, *x.stride()[1:]), dtype=torch.float32, device=x.device)
    normaliser, loss, grad_abs_mean = (gradient.new_empty(shape) for shape in ((samples,), (), ()))
    guarded = gradient.new_empty((), dtype=torch.int64)
    whole = elements <= (
        MAX_WHOLE if _aligned(elements, x, x_t, pred_real, pred_fake, pred_real_uncond) else MAX_WHOLE_UNALIGNED
    )
    tiles = 1 if whole else triton.cdiv(elements, TILE)
    partials = samples * tiles
    workspace = gradient.new_empty((4, partials))
    tensors = {"x": x, "x_t": x_t, "real": pred_real, "fake": pred_fake, "uncond": pred_real_uncond}
    coefficients = {"alpha": alpha, "sigma": sigma}
    arguments = {
        **{f"{name}_ptr": t for name, t in {**tensors, **coefficients}.items()},
        **{f"{name}_stride": 0 if t is None else t.stride(0) for name, t in tensors.items()},
        **{f"{name}_stride": 0 if t is None or t.ndim == 0 else t.stride(0) for name, t in coefficients.items()},
        "alpha": alpha_value,
        "sigma": sigma_value,
        "a": a,
        "a_sigma": a_sigma,
        "b": b,
        "b_alpha": b_alpha,
        "guidance_scale": guidance_scale,
        "scale": scale,
        "gradient_ptr": gradient,
        "normaliser_ptr": normaliser,
        "distance_ptr": workspace[3],
        "partial_ptr": workspace,
        "loss_ptr": loss,
        "grad_abs_mean_ptr": grad_abs_mean,
        "guarded_ptr": guarded,
        "elements": elements,
        "sample_stride": elements,
        "tiles": tiles,
        "partials": partials,
        "numel": x.numel(),
    }
    constexprs = {"BOUND": BOUND, "OF_DATA": b == 0 and b_alpha == 0, "FINISH": FINISH}

    def launch(kernel: triton.JITFunction, programs: int, block: int, num_warps: int) -> Launch:
        return Launch.of(
            kernel,
            programs=programs,
            arguments=arguments,
            constexprs=constexprs | {"BLOCK": block},
            num_warps=num_warps,
        )

    if whole:
        block = triton.next_power_of_2(elements)
        launches = [launch(_whole_kernel, samples, block, max(1, min(16, block // ELEMENTS_PER_WARP)))]
    else:
        launches = [launch(kernel, partials, TILE, TILE_WARPS) for kernel in (_distance_kernel, _gradient_kernel)]
    launches.append(launch(_finish_kernel, 1, FINISH, FINISH_WARPS))
    return launches, (loss, gradient, normaliser, grad_abs_mean, guarded)


def plan_backward(
    grad_loss: torch.Tensor, gradient: torch.Tensor, dtype: torch.dtype
) -> tuple[list[Launch], torch.Tensor]:
    grad_x = torch.empty_strided(gradient.shape, gradient.stride(), dtype=dtype, device=gradient.device)
    arguments = {"grad_loss_ptr": grad_loss, "gradient_ptr": gradient, "grad_x_ptr": grad_x, "numel": gradient.numel()}
    launch = Launch.of(
        _backward_kernel,
        programs=triton.cdiv(gradient.numel(), TILE),
        arguments=arguments,
        constexprs={"BLOCK": TILE},
        num_warps=TILE_WARPS,
    )
    return [launch], grad_x


def dmd_gradient(
    x: torch.Tensor, x_t: torch.Tensor | None, *others: torch.Tensor | float | None
) -> tuple[torch.Tensor, ...]:
    """(loss, gradient, normaliser, grad_abs_mean, guarded); arguments as `plan_forward`, checked by the caller.

    Args:
        x: (B, ...) with at least one element; all (B, ...) tensors float32, float16 or bfloat16, samples dense and in
            one memory order, any distance apart. x_t None: predictions are of the data.
        others: pred_real, pred_fake, pred_real_uncond or None; alpha, sigma float32 (B,) or () or None, where their
            values count; the terms of `fastdistill.diffusion.prediction_terms`; the guidance scale; what the gradient
            that is returned is multiplied with.
    """
    launches, results = plan_forward(x, x_t, *others)
    run_all(launches, x.device)
    return results


def dmd_gradient_backward(grad_loss: torch.Tensor, gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`grad_loss * gradient` in `dtype`; grad_loss () and gradient float32, gradient dense."""
    launches, grad_x = plan_backward(grad_loss, gradient, dtype)
    run_all(launches, gradient.device)
    return grad_x


# ---- the ahead-of-time gate -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """One forward and one backward call, on `meta` tensors."""

    samples: int
    elements: int
    dtype: torch.dtype = torch.bfloat16  # of the predictions
    x_dtype: torch.dtype = torch.float32  # of x and x_t
    guided: bool = True
    of_data: bool = False
    numbers: bool = False  # alpha and sigma are numbers
    storage_offset: int = 0  # in elements: 1 makes every address unaligned

    def launches(self) -> list[Launch]:
        prediction = self._samples_of(self.dtype)
        x = self._samples_of(self.x_dtype)
        coefficient = None if self.numbers else torch.empty(self.samples, device="meta")
        x_t, uncond = None if self.of_data else x, prediction if self.guided else None
        numbers = (0.5, 0.5, float(self.of_data), 0.0, float(not self.of_data), 0.0, 3.0, 1e-5)
        launches, results = plan_forward(x, x_t, prediction, prediction, uncond, coefficient, coefficient, *numbers)
        return launches + plan_backward(results[0], results[1], self.x_dtype)[0]

    def _samples_of(self, dtype: torch.dtype) -> torch.Tensor:
        memory = torch.empty(self.samples * self.elements + self.storage_offset, dtype=dtype, device="meta")
        return memory.as_strided((self.samples, self.elements), (self.elements, 1), self.storage_offset)


def probes() -> Iterator[Probe]:
    # Latents at 512 px are kept; those at 1024 px, like pixels and video, are cut. Then what else makes a version.
    for elements in (4 * 64 * 64, 4 * 128 * 128):
        yield Probe(4, elements, torch.float32)
        yield Probe(4, elements, torch.bfloat16)
        yield Probe(4, elements, torch.float16, torch.float16)
        yield Probe(8, elements, guided=False)
        yield Probe(8, elements, guided=False, of_data=True, numbers=True)
    yield Probe(3, 4 * 65 * 63, torch.float32, storage_offset=1)
    yield Probe(3, 777, torch.float16, torch.float16, storage_offset=1)
    yield Probe(1, 1, torch.float32)
    yield Probe(700, 3 * 2**22, torch.bfloat16)  # offsets beyond 32 bits


def specialisations() -> list[Specialisation]:
    """Every different version that the probes launch; needs neither a GPU nor the interpreter."""
    return unique_specialisations(launch for probe in probes() for launch in probe.launches())
