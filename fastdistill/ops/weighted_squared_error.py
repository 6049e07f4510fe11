"""The mean over the batch of a weight times the mean squared distance of a sample to `scale_a * a + scale_b * b`.

One op under three losses, each with its own target: score distillation against a teacher's sample (ADD, arXiv
2311.17042, section 3.1: a), flow matching against the path's velocity (2209.03003, eq. 1: a - b), and denoising against
epsilon, v or data (2006.11239, eq. 14; 2202.00512, appendix D: scale_a * a + scale_b * b). In plain PyTorch the target,
the difference and its square are tensors of their own; here nothing of the size of x is written but its gradient.
"""

from __future__ import annotations

import math

import torch

from fastdistill.ops import _dispatch, _kernels
from fastdistill.ops._layout import like, samples_in_step

PerSample = torch.Tensor | float


def weighted_squared_error(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor | None = None,
    *,
    scale_a: PerSample = 1.0,
    scale_b: PerSample = 1.0,
    weight: PerSample = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """`mean over the batch of weight * mean over a sample of (x - (scale_a * a + scale_b * b))^2`.

    Computed in float32; differences and squares are not rounded to the inputs' dtype.

    Args:
        x: (B, ...) with at least one element per sample; float32, float16, bfloat16 (every backend) or float64
            (reference). The only input that receives a gradient.
        a, b: (B, ...) of x's shape, each of any of these dtypes. Kernels serve every pair of x's and a's dtypes, so a
            bfloat16 prediction is compared with float32 data as they are; b must have a's dtype, or the reference
            serves. A float64 input makes the call float64.
        scale_a, scale_b, weight: a number, or a tensor () or (B,) on x's device. Read as float32; another dtype is one
            small conversion more.
        backend: "cuda", "triton", "cpu" or "reference"; None lets `fastdistill.ops.explain` 's first choice serve.

    Layout: x, a and b are read in place when their samples are dense and in one memory order (contiguous, channels
    last, ...); samples may lie apart, as in a chunk of a larger batch or of a contiguous tensor's channels. Anything
    else goes to the reference. x's gradient has x's dtype and the strides of `torch.empty_like(x)`.

    Returns:
        () float32 (float64 where an input is). An empty batch gives 0.

    Launches: forward one, and a second that adds up partial sums where one thread-block cluster (CUDA; on a GPU
    without clusters one block) or one program (Triton) does not hold the call; backward one.

    Derivatives: saved are x, a, b and the (B,) tensors, nothing else. The first derivative on every backend, higher
    ones in differentiable PyTorch.

    Raises:
        ValueError, TypeError: bad input, naming the argument, before anything is launched.
        BackendError: the backend asked for does not exist or cannot serve the call; the message says why.
    """
    scales = {"scale_a": scale_a, "scale_b": scale_b, "weight": weight}
    _check(x, a, b, **scales)
    chosen = _dispatch.select(OP, backend, x, a, b, **scales)
    if chosen == _dispatch.REFERENCE or x.shape[0] == 0:
        return reference(x, a, b, **scales)
    tensors, values = zip(*(_split(scale, x.shape[0]) for scale in scales.values()))
    call = (*map(_constant, (a, b)), *tensors, *values)
    if torch.is_grad_enabled() and x.requires_grad:
        return _WeightedSquaredError.apply(x, *call, chosen)
    return _forward(chosen)(x, *call)


def reference(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor | None = None,
    scale_a: PerSample | None = 1.0,
    scale_b: PerSample | None = 1.0,
    weight: PerSample | None = 1.0,
) -> torch.Tensor:
    """The same in plain PyTorch, differentiable as often as needed: fallback, oracle of the tests."""
    difference = _difference(x, a, b, scale_a, scale_b)
    squares = difference.square() * _broadcast(weight, difference)
    return squares.sum() / max(x.numel(), 1)


def reference_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor | None,
    scale_a: PerSample,
    scale_b: PerSample,
    weight: PerSample,
) -> torch.Tensor:
    """dL/dx from the gradient () of the result in plain PyTorch, itself differentiable by grad and x."""
    difference = _difference(x, a, b, scale_a, scale_b)
    outer = grad.to(difference.dtype) * (2 / x.numel()) * _broadcast(weight, difference)
    return like((outer * difference).to(x.dtype), x)


def _difference(x, a, b, scale_a, scale_b):
    wide = torch.float64 if torch.float64 in {t.dtype for t in (x, a, b) if t is not None} else torch.float32
    x = x.to(wide)
    target = _broadcast(scale_a, x) * a.detach().to(wide)
    if b is not None:
        target = target + _broadcast(scale_b, x) * b.detach().to(wide)
    return x - target


def _broadcast(scale: PerSample, like: torch.Tensor) -> PerSample:
    if not isinstance(scale, torch.Tensor):
        return scale
    return scale.detach().to(like.dtype).reshape(-1, *(1,) * (like.dim() - 1))


def _split(scale: PerSample, batch: int) -> tuple[torch.Tensor | None, float]:
    """(tensor (B,) float32 or None, the value for all where there is none)."""
    if not isinstance(scale, torch.Tensor):
        return None, float(scale)
    scale = _constant(scale)
    scale = scale if scale.dtype == torch.float32 else scale.to(torch.float32)
    return (scale.expand(batch) if scale.dim() == 0 else scale), 1.0


def _constant(t: torch.Tensor | None) -> torch.Tensor | None:
    return t.detach() if t is not None and t.requires_grad else t


def _check(x, a, b=None, *, scale_a=1.0, scale_b=1.0, weight=1.0) -> None:
    for name, t in (("x", x), ("a", a), ("b", b)):
        if t is None and name == "b":
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if t.dtype not in (*_kernels.DTYPES, torch.float64):
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")
        if t.shape != x.shape:
            raise ValueError(f"{name}: expected x's shape {tuple(x.shape)}, got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected on x's device {x.device}, got {t.device}")
    if x.dim() < 1:
        raise ValueError("x: expected (B, ...), got a tensor of no dimensions")
    if math.prod(x.shape[1:]) == 0:
        raise ValueError(f"x: a sample must have at least one element, got shape {tuple(x.shape)}")
    if b is None and not (isinstance(scale_b, (int, float)) and scale_b == 1):
        raise ValueError("scale_b: given without b")
    for name, scale in (("scale_a", scale_a), ("scale_b", scale_b), ("weight", weight)):
        _check_scale(name, scale, x)


def _check_scale(name, scale, x) -> None:
    if not isinstance(scale, torch.Tensor):
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"{name}: expected a number or a tensor, got {type(scale).__name__}")
        if not -math.inf < scale < math.inf:  # `isfinite` cannot be traced
            raise ValueError(f"{name}: expected a finite number, got {scale}")
        return
    if not scale.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point tensor, got {scale.dtype}")
    if scale.dim() != 0 and scale.shape != x.shape[:1]:
        raise ValueError(f"{name}: expected shape () or ({x.shape[0]},), one per sample, got {tuple(scale.shape)}")
    if scale.device != x.device:
        raise ValueError(f"{name}: expected on x's device {x.device}, got {scale.device}")


def _kernel_reasons(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor | None = None, **_) -> list[str]:
    """What no kernel serves, whoever wrote it."""
    tensors = (x, a) if b is None else (x, a, b)
    reasons = []
    if any(t.dtype == torch.float64 for t in tensors):
        reasons.append("float64 is served by the reference alone")
    if b is not None and b.dtype != a.dtype:
        reasons.append(f"a is {a.dtype} and b {b.dtype}: needs both in one dtype")
    if not samples_in_step(*tensors):
        strides = ", ".join(str(tuple(t.stride())) for t in tensors)
        reasons.append(f"strides {strides}: needs dense samples in one memory order, not overlapping")
    return reasons


# ---- the registered ops: one overload per backend -------------------------------------------------------------------

# Each scale is its tensor (B,) in float32, or its value where there is none.
_ARGUMENTS = (
    "Tensor x, Tensor a, Tensor? b, Tensor? scale_a, Tensor? scale_b, Tensor? weight,"
    " float value_a, float value_b, float value_weight"
)


def _forward_fake(x, *_):
    return x.new_empty((), dtype=torch.float32)


def _backward_fake(grad, x, *_):
    return torch.empty_like(x)


def _triton_forward(*call):
    from fastdistill.kernels import weighted_squared_error as kernel

    return kernel.weighted_squared_error(*call)


def _triton_backward(*call):
    from fastdistill.kernels import weighted_squared_error as kernel

    return kernel.weighted_squared_error_backward(*call)


_kernels.define("weighted_squared_error", f"({_ARGUMENTS}) -> Tensor", _forward_fake, _triton_forward)
_kernels.define(
    "weighted_squared_error_backward", f"(Tensor grad, {_ARGUMENTS}) -> Tensor", _backward_fake, _triton_backward
)


def _forward(backend: str):
    return getattr(torch.ops.fastdistill.weighted_squared_error, backend)


def _backward(backend: str):
    return getattr(torch.ops.fastdistill.weighted_squared_error_backward, backend)


# ---- autograd -------------------------------------------------------------------------------------------------------


class _WeightedSquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, b, scale_a, scale_b, weight, value_a, value_b, value_weight, backend):
        ctx.save_for_backward(x, a, b, scale_a, scale_b, weight)
        ctx.values = (value_a, value_b, value_weight)
        ctx.backend = backend
        return _forward(backend)(x, a, b, scale_a, scale_b, weight, *ctx.values)

    @staticmethod
    def backward(ctx, grad):
        return _gradient(grad, *ctx.saved_tensors, *ctx.values, ctx.backend), *(None,) * 9


def _gradient(grad, x, a, b, scale_a, scale_b, weight, value_a, value_b, value_weight, backend):
    if torch.is_grad_enabled() and (grad.requires_grad or x.requires_grad):  # create_graph
        pairs = ((scale_a, value_a), (scale_b, value_b), (weight, value_weight))
        return reference_gradient(grad, x, a, b, *(value if t is None else t for t, value in pairs))
    return _backward(backend)(grad, x, a, b, scale_a, scale_b, weight, value_a, value_b, value_weight)


OP = _dispatch.register(_dispatch.Op("weighted_squared_error", _check, _kernels.backends(_kernel_reasons)))
