"""The attention kernels that torch brings, each by name: which can serve a call, which one torch would choose, and
what order its result has in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdistill.ops import _dispatch

PLAIN = "sdpa"  # torch chooses
KERNELS = {
    "sdpa:cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa:flash": SDPBackend.FLASH_ATTENTION,
    "sdpa:efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa:math": SDPBackend.MATH,
}
NAMES = (PLAIN, *KERNELS)

_ON_CPU = (PLAIN, "sdpa:flash", "sdpa:math")
_CAN_USE = {
    "sdpa:cudnn": cuda.can_use_cudnn_attention,
    "sdpa:flash": cuda.can_use_flash_attention,
    "sdpa:efficient": cuda.can_use_efficient_attention,
}


def attention(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """By the kernel of that name; in (B, N, H, D) memory order, whatever order it writes."""
    if name == PLAIN:
        return in_token_order(F.scaled_dot_product_attention(q, k, v, scale=scale))
    with sdpa_kernel(KERNELS[name]):
        return in_token_order(F.scaled_dot_product_attention(q, k, v, scale=scale))


def in_token_order(t: torch.Tensor) -> torch.Tensor:
    """t (B, H, N, D) in (B, N, H, D) memory order; copied only where it lies otherwise."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def available(name: str) -> Callable[[], list[str]]:
    """Whether this machine can run the kernel of that name at all, as a question for `fastdistill info`."""
    return lambda: [] if name in _ON_CPU or torch.cuda.is_available() else ["no CUDA device is visible"]


def reasons(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    """Why the kernel of that name cannot serve; in torch's own words where it is torch that refuses."""
    kind = q.device.type
    if kind not in ("cpu", "cuda"):
        return [f"needs a CPU or CUDA tensor, got {q.device}"]
    if q.dtype == torch.float64:
        return ["float64 is served by the reference alone"]
    if kind == "cpu":
        return _cpu_reasons(name, q, k, v)
    # A compiler sees neither addresses nor torch's answers; torch itself refuses then, if it must, in the graph.
    if name == "sdpa:math" or torch.compiler.is_compiling():
        return []
    if crooked := _misaligned(q, k, v):
        return crooked
    if name == PLAIN or _can_use(name, q, k, v, debug=False):
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _can_use(name, q, k, v, debug=True)
    said = [str(each.message).split(" (Triggered", 1)[0] for each in caught]
    return list(dict.fromkeys(" ".join(text.split()) for text in said)) or ["torch says that it cannot, not why"]


def _cpu_reasons(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    if name not in _ON_CPU:
        return [f"needs a CUDA tensor, got {q.device}"]
    if name == "sdpa:flash":
        return [
            f"{each}'s strides {tuple(t.stride())}: needs the last one to be 1"
            for each, t in (("q", q), ("k", k), ("v", v))
            if t.stride(-1) != 1
        ]
    return []


def _misaligned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    """The kernels load 16 bytes at a time and torch does not look where from; it pads narrower heads itself."""
    if q.shape[-1] * q.element_size() % 16:
        return []
    return [
        f"{each} begins {t.data_ptr() % 16} bytes after a multiple of 16, strides {tuple(t.stride())}: "
        "needs address and strides to be multiples of 16 bytes"
        for each, t in (("q", q), ("k", k), ("v", v))
        if t.data_ptr() % 16 or any(stride * t.element_size() % 16 for stride in t.stride()[:-1])
    ]


def _can_use(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, debug: bool) -> bool:
    return _CAN_USE[name](cuda.SDPAParams(q, k, v, None, 0.0, False, False), debug)


def chosen_by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> str:
    """The kernel that plain `sdpa` runs for this call."""
    choice = torch._fused_sdp_choice(q, k, v, scale=scale)
    return next((name for name, backend in KERNELS.items() if backend.value == choice), "none")


def describe(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> str:
    """Which kernel runs for a backend of that name, and whether a copy follows it."""
    kernel = chosen_by_torch(q, k, v, scale) if name == PLAIN else name
    title = f"torch's {kernel.removeprefix('sdpa:')} kernel {'for CPUs, ' * (q.device.type == 'cpu')}{_version(kernel)}"
    copy = "" if q.numel() == 0 or _writes_token_order(kernel, q) else "; its result is copied to (B, N, H, D) order"
    return f"{title}{copy}"


@_dispatch.constant
def _version(kernel: str) -> str:
    """Of the library that the kernel comes with."""
    number = torch.backends.cudnn.version() if kernel == "sdpa:cudnn" else None
    return f"torch {torch.__version__}" + (f", cuDNN {number}" if number else "")


def _writes_token_order(kernel: str, q: torch.Tensor) -> bool:
    """cuDNN's result lies like q, and on a CPU flash's; the explicit product of matrices is written head by head."""
    if kernel == "sdpa:math":
        return q.shape[1] == 1 or q.shape[2] == 1
    if kernel == "sdpa:cudnn" or q.device.type == "cpu":
        return torch.empty_like(q, device="meta").transpose(1, 2).is_contiguous()
    return True
