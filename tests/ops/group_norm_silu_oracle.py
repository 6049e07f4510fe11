"""What the raw ops of group_norm_silu must compute, in float64; shared by the tests of kernels that no GPU runs."""

import torch
import torch.nn.functional as F

from tests.ops.accuracy import assert_close_to_exact

NAMES = ("y", "mean", "rstd", "grad_x", "grad_weight", "grad_bias", "grad_add")

# A gradient of the same values in strides that backward must read as they are.
GRADIENTS = {
    "other layout": lambda like: channels_last(like) if like.is_contiguous() else like.contiguous(),
    "expanded from one value": lambda like: like[:1, :1, :1, :1].expand(like.shape),
    "expanded over the pixels": lambda like: like[:, :, :1, :1].expand(like.shape),
    "every second channel of a larger image": lambda like: torch.cat([like, like], 1)[:, ::2],
    "one element late": lambda like: torch.cat([like.flatten(), like.flatten()[:1]])[1:].view(like.shape),
}


def channels_last(image):
    return image.movedim(1, -1).contiguous().movedim(-1, 1)


def inputs(shape, dtype=torch.float32, mean=0.0, std=1.0):
    """x, weight, bias, add, grad_y."""
    batch, channels = shape[:2]
    x = (torch.randn(shape) * std + mean).to(dtype)
    weight, bias = torch.randn(channels) + 1, torch.randn(channels)
    return x, weight, bias, torch.randn(batch, channels), torch.randn(shape).to(dtype)


def run(forward, backward, x, groups, weight, bias, add, grad_y, eps=1e-5, silu=True):
    """The results of NAMES from the two raw ops."""
    y, mean, rstd = forward(x, groups, weight, bias, add, eps, silu)
    return y, mean, rstd, *backward(grad_y, x, groups, weight, bias, add, mean, rstd, silu)


def in_pytorch(x, groups, weight, bias, add, grad_y, eps=1e-5, silu=True, dtype=torch.float64):
    """The same in plain PyTorch, in `dtype`."""
    x, weight, bias, add, grad_y = (t.to(dtype) for t in (x, weight, bias, add, grad_y))
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, add)]
    u = leaves[0] + leaves[3].reshape(add.shape + (1,) * (x.dim() - 2))
    # Contiguous: torch's channels-last kernel takes the variance as E[x^2] - E[x]^2.
    z = torch.group_norm(u.contiguous(), groups, leaves[1], leaves[2], eps)
    y = F.silu(z) if silu else z
    per_group = u.detach().reshape(x.shape[0], groups, -1)
    rstd = 1 / torch.sqrt(per_group.var(dim=2, correction=0) + eps)
    return y.detach(), per_group.mean(dim=2), rstd, *torch.autograd.grad(y, leaves, grad_y)


def check(ours, *call, large_mean=False, truncates_bfloat16=False, **settings):
    """`ours` (the results of NAMES) against float64, by the tolerance rule."""
    exact = in_pytorch(*call, **settings)
    x = call[0]
    # What is not rounded to x's dtype is held to float32, whatever x is.
    in_float32 = in_pytorch(*call, **settings, dtype=torch.float32)
    in_dtype = in_pytorch(*call, **settings, dtype=x.dtype)
    for name, value, exact_, torch32, torchs in zip(NAMES, ours, exact, in_float32, in_dtype):
        rounded = name in ("y", "grad_x")
        assert value.dtype == (x.dtype if rounded else torch.float32), name
        assert_close_to_exact(
            value,
            exact_,
            torchs if rounded else torch32,
            value.dtype,
            large_mean=large_mean,
            whole_ulp=truncates_bfloat16 and value.dtype == torch.bfloat16,
            what=name,
        )
