"""The head of LPIPS: how far apart two lists of features are, weighted per channel. Forward, backward and higher
derivatives.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924, equation 1.
With u the unit vector of each pixel's channels, per layer

    d_b = 1/S sum_s sum_c w_c (u_bcs - v_bcs)^2,   u = x / (|x| + 1e-10),  v = y / (|y| + 1e-10)

and the distance is the sum over layers. One layer is one registered op: in the backward, each layer's gradients are
made when autograd reaches it, and not all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastdistill.ops import _dispatch, _kernels
from fastdistill.ops._autograd import needed, through_pytorch
from fastdistill.ops._layout import layout_of, like

EPS = 1e-10  # added to the norm, as the public `lpips` package (0.1.4) does

Layers = torch.Tensor | Sequence[torch.Tensor]


def lpips_distance(
    features_x: Layers, features_y: Layers, weights: Layers, *, backend: str | None = None
) -> torch.Tensor:
    """The LPIPS distance of each sample: unit vectors over channels, squared difference, weighted sum over channels,
    mean over pixels, sum over layers. Computed in float32; nothing of the features' size is made beside their
    gradients.

    Args:
        features_x, features_y: one tensor, or a list of one per layer: (B, C, *spatial) with any number of trailing
            dimensions, 0 included, each pair of one shape, dtype and device; float32, float16, bfloat16 (every
            backend) or float64 (reference). Contiguous and channels-last features are read in place, x and y each
            in its own layout; other strides go to the reference.
        weights: one tensor per layer, (C,) or (1, C, 1, …), any floating dtype: the linear heads of LPIPS.
        backend: "cuda", "triton", "cpu" or "reference"; None lets `fastdistill.ops.explain("lpips_distance", x, y, w)`
            's first choice serve, layer by layer.

    Returns:
        (B,) float32 (float64 for float64 features). 0 where x and y are equal.

    Derivatives: of all three arguments. Only the features and weights are saved; norms are computed again. The first
    derivative on every backend, higher ones in differentiable PyTorch. A feature vector of zeros has no direction: its
    unit vector is zero and so is its gradient (its formal derivative is 1e10 times the incoming one; PyTorch's own
    autograd gives NaN). In float32 that is so for every vector whose squares vanish, norms below about 1e-22.

    Raises:
        ValueError, TypeError: bad input, naming the argument and the layer, before anything is launched.
        BackendError: the backend asked for does not exist or cannot serve the call; the message says why.
    """
    layers = _layers(features_x, features_y, weights)
    chosen = [_dispatch.select(OP, backend, x, y, w) for x, y, w in layers]
    total = None
    for (x, y, weight), name in zip(layers, chosen):
        distance = _layer_distance(x, y, weight, name)
        total = distance if total is None else total + distance
    return total


def reference(features_x: torch.Tensor, features_y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One layer in plain PyTorch, differentiable as often as needed: fallback, oracle of the tests, benchmark baseline.

    16-bit inputs are computed in float32.
    """
    wide = _wide(features_x.dtype)
    difference = _unit(features_x.to(wide)) - _unit(features_y.to(wide))
    weight = weights.to(wide).reshape(-1, *(1,) * (features_x.dim() - 2))
    pixels = features_x.shape[2:].numel()
    return (weight * difference.square()).flatten(1).sum(1) / pixels


def _unit(x: torch.Tensor) -> torch.Tensor:
    squares = x.square().sum(1, keepdim=True)
    empty = squares == 0
    return x * torch.where(empty, 0.0, 1 / (torch.where(empty, 1.0, squares).sqrt() + EPS))


def _layer_distance(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, backend: str) -> torch.Tensor:
    if backend == _dispatch.REFERENCE or x.numel() == 0:
        return reference(x, y, weight)
    weight = weight.reshape(-1).to(torch.float32)
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or weight.requires_grad):
        return _LpipsDistance.apply(x, y, weight, backend)
    return _forward(backend)(x, y, weight)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- what each backend can serve ------------------------------------------------------------------------------------


def _layers(features_x, features_y, weights) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The arguments layer by layer, checked."""
    if isinstance(features_x, torch.Tensor):
        _check(features_x, features_y, weights)
        return [(features_x, features_y, weights)]
    given = {"features_x": features_x, "features_y": features_y, "weights": weights}
    for name, value in given.items():
        if not isinstance(value, (list, tuple)):
            raise TypeError(
                f"{name}: expected a tensor or a list of one per layer for all three arguments, "
                f"got {type(value).__name__}"
            )
        if len(value) != len(features_x):
            raise ValueError(f"{name}: expected {len(features_x)} layers, as many as features_x has, got {len(value)}")
    if not features_x:
        raise ValueError("features_x: needs at least one layer, got an empty list")
    layers = list(zip(features_x, features_y, weights))
    for index, layer in enumerate(layers):
        _check(*layer, at=f"[{index}]")
        first = layers[0][0]
        if layer[0].shape[0] != first.shape[0]:
            raise ValueError(
                f"features_x[{index}]: expected the batch of features_x[0], {first.shape[0]}, got {layer[0].shape[0]}"
            )
        if (layer[0].device, _wide(layer[0].dtype)) != (first.device, _wide(first.dtype)):
            raise ValueError(
                f"features_x[{index}]: expected on {first.device} and not to mix float64 with others, as features_x[0] "
                f"({first.dtype}); got {layer[0].dtype} on {layer[0].device}"
            )
    return layers


def _check(features_x, features_y, weights, *, at: str = "") -> None:
    """One layer; `at` is its index as the message shows it."""
    for name, t in (("features_x", features_x), ("features_y", features_y), ("weights", weights)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}{at}: expected a tensor, got {type(t).__name__}")
    x = features_x
    if x.dim() < 2 or 0 in x.shape[1:]:
        raise ValueError(f"features_x{at}: expected (B, C, *spatial) with C and pixels >= 1, got {tuple(x.shape)}")
    if x.dtype not in (*_kernels.DTYPES, torch.float64):
        raise TypeError(f"features_x{at}: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    if features_y.shape != x.shape:
        raise ValueError(f"features_y{at}: expected features_x's shape {tuple(x.shape)}, got {tuple(features_y.shape)}")
    if features_y.dtype != x.dtype:
        raise TypeError(f"features_y{at}: expected features_x's dtype {x.dtype}, got {features_y.dtype}")
    channels = x.shape[1]
    if weights.numel() != channels or weights.shape[: 2 if weights.dim() > 1 else 1][-1] != channels:
        raise ValueError(
            f"weights{at}: expected ({channels},) or (1, {channels}, 1, 1), a weight per channel, "
            f"got {tuple(weights.shape)}"
        )
    if not weights.dtype.is_floating_point:
        raise TypeError(f"weights{at}: expected a floating dtype, got {weights.dtype}")
    for name, t in (("features_y", features_y), ("weights", weights)):
        if t.device != x.device:
            raise ValueError(f"{name}{at}: expected on features_x's device {x.device}, got {t.device}")


def _kernel_reasons(features_x: torch.Tensor, features_y: torch.Tensor, weights: torch.Tensor) -> list[str]:
    """What no kernel serves, whoever wrote it."""
    reasons = []
    if features_x.dtype == torch.float64:
        reasons.append("float64 is served by the reference alone")
    for name, t in (("features_x", features_x), ("features_y", features_y)):
        # The same sample for a whole batch (an expanded target) is read in place as well.
        if layout_of(t[:1] if t.stride(0) == 0 else t) is None:
            reasons.append(f"{name}'s strides {tuple(t.stride())}: neither contiguous nor channels last")
    return reasons


# ---- the registered ops: one overload per backend -------------------------------------------------------------------

_FORWARD = "(Tensor x, Tensor y, Tensor weight) -> Tensor"
# What is not asked for has no elements.
_BACKWARD = (
    "(Tensor grad, Tensor x, Tensor y, Tensor weight, bool of_x, bool of_y, bool of_weight) -> (Tensor, Tensor, Tensor)"
)


def _forward_fake(x, y, weight):
    return x.new_empty((x.shape[0],), dtype=torch.float32)


def _backward_fake(grad, x, y, weight, of_x, of_y, of_weight):
    asked = ((x, of_x), (y, of_y), (weight, of_weight))
    return tuple(t.new_empty((0,)) if not of else torch.empty_like(t) for t, of in asked)


def _triton_forward(x, y, weight):
    from fastdistill.kernels import lpips_distance as kernel

    return kernel.lpips_distance(x, y, weight)


def _triton_backward(grad, x, y, weight, of_x, of_y, of_weight):
    from fastdistill.kernels import lpips_distance as kernel

    return kernel.lpips_distance_backward(grad, x, y, weight, of_x, of_y, of_weight)


_kernels.define("lpips_distance", _FORWARD, _forward_fake, _triton_forward)
_kernels.define("lpips_distance_backward", _BACKWARD, _backward_fake, _triton_backward)


def _forward(backend: str):
    return getattr(torch.ops.fastdistill.lpips_distance, backend)


def _backward(backend: str):
    return getattr(torch.ops.fastdistill.lpips_distance_backward, backend)


# ---- autograd -------------------------------------------------------------------------------------------------------


class _LpipsDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, backend):
        ctx.save_for_backward(x, y, weight)
        ctx.backend = backend
        return _forward(backend)(x, y, weight)

    @staticmethod
    def backward(ctx, grad):
        x, y, weight = ctx.saved_tensors
        return *gradients(grad, x, y, weight, ctx.needs_input_grad[:3], ctx.backend), None


def gradients(grad, x, y, weight, needs, backend) -> list[torch.Tensor | None]:
    """dL/dx, dL/dy, dL/dweight from dL/d(distance) (B,); where they must be differentiable, in plain PyTorch."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (grad, x, y, weight)):
        found = through_pytorch(lambda *inputs: [reference(*inputs)], (x, y, weight), [grad])
        return needed([like(g, t) for g, t in zip(found, (x, y, weight))], needs)
    return needed(_backward(backend)(grad, x, y, weight, *needs), needs)


OP = _dispatch.register(
    _dispatch.Op("lpips_distance", _check, _kernels.backends(_kernel_reasons, "features_x"), tensor="features_x")
)
