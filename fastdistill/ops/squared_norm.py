"""The squared norm of each sample over any number of tensors at once: what a gradient penalty takes of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastdistill.ops import _dispatch, _kernels
from fastdistill.ops._layout import samples_in_step

Tensors = Sequence[torch.Tensor]


def squared_norm(tensors: torch.Tensor | Tensors, *, backend: str | None = None) -> torch.Tensor:
    """For each sample the sum of the squares of its elements in all tensors, in float32.

    Args:
        tensors: one tensor or a list of them, (B, ...) with one B and any further dimensions; float32, float16,
            bfloat16 (every backend) or float64 (reference). Read in place where each sample is dense in memory, in any
            order of the dimensions, and samples do not overlap; other strides go to the reference.
        backend: "cuda", "cpu" or "reference"; None lets `fastdistill.ops.explain` 's first choice serve.

    Returns:
        (B,), float32 (float64 if any tensor is); 0 for a sample without elements.

    Derivatives: of every order on every backend; the first is `2 * grad[b] * tensor[b]`, rounded once. Only the
    tensors are saved.

    Raises:
        ValueError, TypeError: bad input, naming the argument, before anything is launched.
        BackendError: the backend asked for does not exist or cannot serve the call; the message says why.
    """
    _check(tensors)
    chosen = _dispatch.select(OP, backend, tensors)
    tensors = _as_list(tensors)
    if chosen == _dispatch.REFERENCE or tensors[0].shape[0] == 0:
        return reference(tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _SquaredNorm.apply(chosen, *tensors)
    return _forward(chosen)(tensors)


def reference(tensors: Tensors) -> torch.Tensor:
    """The same in plain PyTorch, differentiable as often as needed."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.stack([t.to(dtype).reshape(t.shape[0], t[:1].numel()).square().sum(1) for t in tensors]).sum(0)


def gradient(grad: torch.Tensor, tensors: Tensors) -> list[torch.Tensor]:
    """dL/dtensors from dL/dnorm (B,), itself differentiable."""
    twice = 2 * grad
    return [(t * twice.view(-1, *(1,) * (t.dim() - 1))).to(t.dtype) for t in tensors]


def _as_list(tensors) -> list:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _check(tensors) -> None:
    if not isinstance(tensors, (torch.Tensor, list, tuple)):
        raise TypeError(f"tensors: expected a tensor or a list of tensors, got {type(tensors).__name__}")
    tensors = _as_list(tensors)
    if not tensors:
        raise ValueError("tensors: expected at least one, got none")
    for i, t in enumerate(tensors):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"tensors[{i}]: expected a tensor, got {type(t).__name__}")
        if t.dtype not in (*_kernels.DTYPES, torch.float64):
            raise TypeError(f"tensors[{i}]: expected float32, float16, bfloat16 or float64, got {t.dtype}")
        if t.dim() < 1 or t.shape[0] != tensors[0].shape[0]:
            raise ValueError(
                f"tensors[{i}]: expected (B, ...) with the batch of the first, {tuple(tensors[0].shape[:1])}, "
                f"got shape {tuple(t.shape)}"
            )
        if t.device != tensors[0].device:
            raise ValueError(f"tensors[{i}] is on {t.device}, the first on {tensors[0].device}")


def _kernel_reasons(tensors) -> list[str]:
    """What no kernel serves, whoever wrote it."""
    reasons = []
    for i, t in enumerate(_as_list(tensors)):
        if t.dtype == torch.float64:
            reasons.append("float64 is served by the reference alone")
        if not (t.is_contiguous() or samples_in_step(t)):
            reasons.append(f"tensors[{i}] has strides {tuple(t.stride())}: each sample must be dense, none overlapping")
    return reasons


# ---- the registered op: one overload per backend --------------------------------------------------------------------

_NAMES = ("cuda", "cpu")


def _fake(tensors):
    return tensors[0].new_empty(tensors[0].shape[0], dtype=torch.float32)


_kernels.define("squared_norm", "(Tensor[] tensors) -> Tensor", _fake, names=_NAMES)


def _forward(backend: str):
    return getattr(torch.ops.fastdistill.squared_norm, backend)


# ---- autograd -------------------------------------------------------------------------------------------------------


class _SquaredNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, *tensors):
        ctx.save_for_backward(*tensors)
        return _forward(backend)(tensors)

    @staticmethod
    def backward(ctx, grad):
        found = iter(gradient(grad, [t for t, n in zip(ctx.saved_tensors, ctx.needs_input_grad[1:]) if n]))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])


OP = _dispatch.register(
    _dispatch.Op("squared_norm", _check, _kernels.backends(_kernel_reasons, "tensors", _NAMES), tensor="tensors")
)
