"""Moments of Adam in 8 bits, in plain PyTorch: what csrc/eight_bit.h does, which says how the codes are laid out.

Block-wise quantisation: Dettmers et al., arXiv 2110.02861. In place of the paper's dynamic map the codes are small
floats with 3 bits of mantissa, 4 of exponent and a sign for the first moment, 5 of exponent for the second, because
these are a shift of float32's bits; and rounding is stochastic, so that a slow change is not rounded away.

Error of one step, relative to the exact value: at most 1/8, and 0 on average, where the value is at least 1.9e-5 (first
moment) or 2.9e-10 (second) of the largest in its block; below that at most the bound itself times the largest.
"""

from __future__ import annotations

import torch

BLOCK = 256  # values that share a scale
FIRST_SMALLEST, SECOND_SMALLEST = 1.25 * 2.0**-16, 1.25 * 2.0**-32

_SHIFT = 20
_ONE = 0x3F800000 >> _SHIFT
_FIRST_TOP, _SECOND_TOP = 127, 255
_MASK = 0xFFFFFFFF


def blocks_of(elements: int) -> int:
    return -(-elements // BLOCK)


def zeros(param: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of both moments, in the memory order of `param`, and their scales (2, blocks)."""
    codes = [torch.zeros_like(param, dtype=torch.uint8) for _ in range(2)]
    return codes[0], codes[1], param.new_zeros((2, blocks_of(param.numel())), dtype=torch.float32)


def decode(codes: torch.Tensor, scales: torch.Tensor, *, second: bool) -> torch.Tensor:
    """float32 values, in the shape and memory order of `codes`. scales: (blocks,)."""
    flat = in_memory_order(codes).to(torch.int32)
    top = _SECOND_TOP if second else _FIRST_TOP
    magnitude = flat & top
    values = ((magnitude + (_ONE - top)) << _SHIFT).view(torch.float32)
    values = torch.where(magnitude == 0, 0.0, values)
    if not second:
        values = torch.where(flat > _FIRST_TOP, -values, values)
    result = torch.empty_like(codes, dtype=torch.float32)
    in_memory_order(result).copy_(values * _per_element(scales, flat.numel()))
    return result


def encode(values: torch.Tensor, step: torch.Tensor | float, *, second: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in the shape and memory order of `values`, and their scales (blocks,). step: decides the rounding."""
    flat = in_memory_order(values).float()
    padded = torch.nn.functional.pad(flat.abs(), (0, -flat.numel() % BLOCK))
    scales = padded.view(-1, BLOCK).amax(1) if flat.numel() else flat.new_zeros(0)
    x = flat.abs() / torch.where(scales > 0, scales, 1.0)[_block_index(flat)]
    bits = x.view(torch.int32).long()
    random = _random_bits(flat.numel(), step, flat.device)
    if second:
        rounded = ((bits + (random & (2**_SHIFT - 1))) >> _SHIFT) - (_ONE - _SECOND_TOP)
        flat_codes = torch.where(bits == 0, 0, rounded.clamp(1, _SECOND_TOP))
    else:
        r = random >> (32 - _SHIFT)
        rounded = ((bits + r) >> _SHIFT) - (_ONE - _FIRST_TOP)
        small = (r.float() * (FIRST_SMALLEST / 2**_SHIFT) < x).long()
        flat_codes = torch.where(x < FIRST_SMALLEST, small, rounded.clamp(max=_FIRST_TOP))
        flat_codes = flat_codes + torch.signbit(flat).long() * (_FIRST_TOP + 1)
    codes = torch.empty_like(values, dtype=torch.uint8)
    in_memory_order(codes).copy_(flat_codes)
    return codes, scales


def in_memory_order(t: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements as they lie in memory, as a view (n,)."""
    return t.as_strided((t.numel(),), (1,))


def _block_index(flat: torch.Tensor) -> torch.Tensor:
    return torch.arange(flat.numel(), device=flat.device) // BLOCK


def _per_element(scales: torch.Tensor, count: int) -> torch.Tensor:
    return scales.repeat_interleave(BLOCK)[:count]


def _random_bits(count: int, step: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """Murmur3's finaliser over element and step: uint32 in int64."""
    step = torch.as_tensor(step, device=device).long()
    h = (torch.arange(count, device=device) * 0x9E3779B1 + step * 0x85EBCA77) & _MASK
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)
