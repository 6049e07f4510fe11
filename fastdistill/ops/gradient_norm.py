"""The norm of many gradients as one vector, in one sweep: what global-norm clipping needs, without a host sync."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastdistill.ops import _dispatch, _kernels


def gradient_norm(grads: Sequence[torch.Tensor], *, backend: str | None = None) -> torch.Tensor:
    """`torch.nn.utils.get_total_norm(grads)` in float32, whatever the gradients' dtypes are. Not differentiable.

    Args:
        grads: at least one tensor, all on one device, of any shapes; float32, float16, bfloat16 (every backend, dense
            in any order of memory) or float64 (reference).
        backend: "cuda", "cpu" or "reference"; None lets `fastdistill.ops.explain` 's first choice serve.

    Returns:
        (), float32 (float64 where a gradient is), on the gradients' device: sqrt(sum g^2). Inf or NaN if a gradient
        holds one, and where the squares leave float32's range (a norm above 1.8e19). The same bits on every run.

    Raises:
        ValueError, TypeError: bad input, naming the argument.
        BackendError: the backend asked for does not exist or cannot serve the call; the message says why.
    """
    _check(grads)
    chosen = _dispatch.select(OP, backend, grads)
    with torch.no_grad():
        return reference(grads) if chosen == _dispatch.REFERENCE else raw(chosen, list(grads))


def reference(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same in plain PyTorch."""
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=wide) for g in grads]))


def raw(backend: str, grads: list[torch.Tensor]) -> torch.Tensor:
    """The registered op of a backend that serves these gradients, unchecked."""
    return getattr(torch.ops.fastdistill.gradient_norm, backend)(grads)


def is_dense(t: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order of the dimensions."""
    if t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)):
        return True
    size = 1
    for step, length in sorted((step, length) for step, length in zip(t.stride(), t.shape) if length != 1):
        if step != size:
            return False
        size *= length
    return True


def walk_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order, at the same distances."""
    if a.stride() == b.stride():
        return True
    return all(x == y for x, y, length in zip(a.stride(), b.stride(), a.shape) if length != 1)


def _check(grads) -> None:
    if isinstance(grads, torch.Tensor) or not isinstance(grads, Sequence):
        raise TypeError(f"grads: expected a list of tensors, got {type(grads).__name__}")
    if not grads:
        raise ValueError("grads: expected at least one tensor, got none")
    for i, g in enumerate(grads):
        if not isinstance(g, torch.Tensor):
            raise TypeError(f"grads[{i}]: expected a tensor, got {type(g).__name__}")
        if g.layout != torch.strided:
            raise TypeError(f"grads[{i}]: expected a dense tensor, got layout {g.layout}")
        if g.dtype not in (*_kernels.DTYPES, torch.float64):
            raise TypeError(f"grads[{i}]: expected float32, float16, bfloat16 or float64, got {g.dtype}")
        if g.device != grads[0].device:
            raise ValueError(f"grads[{i}]: all must lie on one device, got {g.device} and {grads[0].device}")


def _kernel_reasons(grads: Sequence[torch.Tensor]) -> list[str]:
    reasons = []
    if any(g.dtype == torch.float64 for g in grads):
        reasons.append("float64 is served by the reference alone")
    gaps = [i for i, g in enumerate(grads) if not is_dense(g)]
    if gaps:
        i = gaps[0]
        reasons.append(f"grads[{i}] has strides {tuple(grads[i].stride())}: needs memory without gaps or overlaps")
    return reasons


# No Triton: the kernels take a table of pointers, of any number of tensors, which Triton's launcher has no type for.
_NAMES = ("cuda", "cpu")
_kernels.define(
    "gradient_norm",
    "(Tensor[] grads) -> Tensor",
    lambda grads: grads[0].new_empty((), dtype=torch.float32),
    names=_NAMES,
)

OP = _dispatch.register(
    _dispatch.Op(
        "gradient_norm",
        _check,
        _kernels.backends(_kernel_reasons, "grads", _NAMES),
        tensor="grads",
    )
)
