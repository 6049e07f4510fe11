"""What the forward and the backward kernels have in common, as Triton device functions."""

import triton
import triton.language as tl

# Sizes that decide no alignment are left out of a kernel's specialisation: fewer versions to compile.
RUNTIME_SIZES = [
    "batch",
    "groups",
    "channels_per_group",
    "units_per_tile",
    "tiles",
    "channel_tiles",
    "pixel_tiles",
    "splits",
]
# The combine kernels read a few floats: no size and no stride is worth a version of its own.
COMBINE_RUNTIME_SIZES = [
    *RUNTIME_SIZES,
    "channels",
    "pixels",
    "pixels_per_split",
    "weight_stride",
    "bias_stride",
    "add_stride_n",
    "add_stride_c",
    "coefficient_stride",
    "partial_stride",
]


@triton.jit
def load_channel_values(ptr, offsets, mask, default: tl.constexpr):
    """Per-channel parameter as float32; `default` when the call has no such parameter."""
    if ptr is None:
        values = tl.full(offsets.shape, default, tl.float32)
    else:
        values = tl.load(ptr + offsets, mask=mask, other=default).to(tl.float32)
    return values


@triton.jit
def activate(z, SILU: tl.constexpr):
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def activation_gradient(grad_y, z, SILU: tl.constexpr):
    """dL/dz from dL/dy."""
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        grad_y = grad_y * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return grad_y


@triton.jit
def group_totals(values, slot, BLOCK_G: tl.constexpr):
    """For each channel the total of `values` over its group. slot: the group's place in the tile; >= BLOCK_G:
    padding.

    Selecting instead of multiplying by 0 and 1 keeps a NaN inside its own group.
    """
    if BLOCK_G == 1:
        totals = tl.sum(tl.where(slot == 0, values, 0.0), axis=0) + tl.zeros_like(values)
    else:
        member = slot[:, None] == tl.arange(0, BLOCK_G)[None, :]
        per_group = tl.sum(tl.where(member, values[:, None], 0.0), axis=0)
        totals = tl.sum(tl.where(member, per_group[None, :], 0.0), axis=1)
    return totals


@triton.jit
def two_sum(a, b):
    """a + b as the rounded sum and its rounding error, exactly (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@triton.jit
def tile_pointers(ptr, n, c, s, stride_n, stride_c, stride_s):
    """Addresses of a (channels, pixels) tile; n, c and s are int64, so every product is."""
    return ptr + n * stride_n + c[:, None] * stride_c + s[None, :] * stride_s
