"""Clipping, AdamW and EMA of many parameters in one sweep, in place. `fastdistill.optim.FusedAdamW` is its user.

AdamW: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, as `torch.optim.AdamW` computes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fastdistill.ops import _dispatch, _kernels, eight_bit
from fastdistill.ops.gradient_norm import is_dense, walk_alike

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Factors:
    """The numbers of a step. Tensors are float32 scalars on the parameters' device, read there."""

    lr: float | torch.Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    max_grad_norm: float = math.inf
    ema_decay: float | torch.Tensor = 0.999
    maximize: bool = False


@dataclass
class Batch:
    """Parameters of one dtype and device that a step treats alike, and what belongs to each, in the same order.

    exp_avgs, exp_avg_sqs: like the parameters in float32 (float64 of float64), or uint8 codes (`ops.eight_bit`) with
    `scales` (2, blocks) of each. steps: () float32. masters: float32 copies of 16-bit parameters, which the arithmetic
    reads and writes in their place. emas: averages in the masters' dtype; empty for none.
    """

    params: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    exp_avgs: list[torch.Tensor] = field(default_factory=list)
    exp_avg_sqs: list[torch.Tensor] = field(default_factory=list)
    steps: list[torch.Tensor] = field(default_factory=list)
    masters: list[torch.Tensor] = field(default_factory=list)
    emas: list[torch.Tensor] = field(default_factory=list)
    scales: list[torch.Tensor] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.params[0].device


def adamw_(
    batch: Batch,
    norm: torch.Tensor,
    factors: Factors,
    *,
    skipped: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of AdamW on every tensor of `batch`, in place, in float32, without a host sync.

    With c = min(1, max_grad_norm / (norm / grad_scale + 1e-6)) / grad_scale and the gradient g = c * grad:
    `p <- p (1 - lr weight_decay) - lr m^ / (sqrt(v^) + eps)`, then `ema <- ema + (1 - ema_decay) (p - ema)`.

    Args:
        batch: what is stepped. Kernels need every tensor dense and in its parameter's order of memory.
        norm: () float32, of all gradients as they are (`gradient_norm`). Where it is not finite nothing is changed.
        factors: the numbers.
        skipped: () int64, counts the steps that changed nothing.
        grad_scale: () float32 by which the gradients are too large.
        found_inf: () float32; where it is not 0 nothing is changed.
        backend: "cuda", "cpu" or "reference"; None lets the first that can serve.

    Raises:
        BackendError: the backend asked for does not exist or cannot serve the call; the message says why.
    """
    chosen = _dispatch.select(OP, backend, batch)
    serve = reference if chosen == _dispatch.REFERENCE else getattr(torch.ops.fastdistill.adamw, chosen)
    lr, lr_tensor = _number(factors.lr)
    ema_decay, ema_decay_tensor = _number(factors.ema_decay)
    serve(
        batch.params,
        batch.grads,
        batch.exp_avgs,
        batch.exp_avg_sqs,
        batch.steps,
        batch.masters,
        batch.emas,
        batch.scales,
        skipped,
        norm,
        grad_scale,
        found_inf,
        lr_tensor,
        ema_decay_tensor,
        lr,
        *factors.betas,
        factors.eps,
        factors.weight_decay,
        factors.max_grad_norm,
        ema_decay,
        factors.maximize,
    )
    # A backward pass that saved them before this step would be wrong: autograd says so, if it knows that they changed.
    torch.autograd.graph.increment_version([*batch.params, *batch.emas])


def reference(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    masters: Tensors,
    emas: Tensors,
    scales: Tensors,
    skipped: torch.Tensor | None,
    norm: torch.Tensor,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    lr_tensor: torch.Tensor | None,
    ema_decay_tensor: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    ema_decay: float,
    maximize: bool,
) -> None:
    """The same in plain PyTorch, with the registered op's arguments. A tensor at a time: the temporaries are a few of
    one parameter's size, where the whole list's would be more than the moments."""
    scale = torch.ones_like(norm) if grad_scale is None else grad_scale
    norm = norm / scale
    taken = norm.isfinite() if found_inf is None else norm.isfinite() & (found_inf == 0)
    if skipped is not None:
        skipped += ~taken
    factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0) * (-1.0 if maximize else 1.0) / scale
    lr = lr if lr_tensor is None else lr_tensor
    ema_weight = 1 - (ema_decay if ema_decay_tensor is None else ema_decay_tensor)

    def update(old: torch.Tensor, new: torch.Tensor) -> None:
        old.copy_(torch.where(taken, new.to(old.dtype), old))

    for i, (param, grad, exp_avg, exp_avg_sq, step) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, steps)):
        p, m, v, next_step = masters[i] if masters else param, exp_avg, exp_avg_sq, step + 1
        if scales:
            m = eight_bit.decode(exp_avg, scales[i][0], second=False)
            v = eight_bit.decode(exp_avg_sq, scales[i][1], second=True)
        g = grad.to(p.dtype) * factor
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        count = next_step.double()
        step_size = (lr / (1 - beta1**count)).to(p.dtype)
        root = (1 - beta2**count).sqrt().to(p.dtype)
        new = p * (1 - lr * weight_decay) - step_size * m / (v.sqrt() / root + eps)
        if scales:
            for old, value, row in ((exp_avg, m, 0), (exp_avg_sq, v, 1)):
                codes, largest = eight_bit.encode(torch.where(taken, value, 0.0), next_step, second=row == 1)
                update(old, codes)
                update(scales[i][row], largest)
        else:
            update(exp_avg, m)
            update(exp_avg_sq, v)
        if emas:
            update(emas[i], emas[i] + ema_weight * (new - emas[i]))
        if masters:
            update(masters[i], new)
        update(param, new)
        update(step, next_step)


def _number(value: float | torch.Tensor) -> tuple[float, torch.Tensor | None]:
    return (0.0, value) if isinstance(value, torch.Tensor) else (float(value), None)


def in_step(tensors: Tensors) -> bool:
    """Whether tensors of one shape can be walked together through memory, from their first elements on."""
    return is_dense(tensors[0]) and all(walk_alike(tensors[0], t) for t in tensors[1:])


def _check(batch) -> None:
    if not isinstance(batch, Batch):
        raise TypeError(f"batch: expected a Batch, got {type(batch).__name__}")


def _kernel_reasons(batch: Batch) -> list[str]:
    """One parameter stands for all: a batch holds what is treated alike."""
    if not batch.params:
        return []
    lists = (batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs, batch.masters, batch.emas)
    first = [tensors[0] for tensors in lists if tensors]
    reasons = []
    if first[0].dtype == torch.float64:
        reasons.append("float64 is served by the reference alone")
    if not in_step(first):
        strides = ", ".join(str(tuple(t.stride())) for t in first)
        reasons.append(f"strides {strides}: needs memory without gaps, in the same order in all tensors of a parameter")
    return reasons


_SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor(e!)[] masters, Tensor(f!)[] emas, Tensor(g!)[] scales, Tensor(h!)? skipped, Tensor norm, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor? lr_tensor, Tensor? ema_decay_tensor, float lr, float beta1, "
    "float beta2, float eps, float weight_decay, float max_grad_norm, float ema_decay, bool maximize) -> ()"
)

# No Triton: the kernels take a table of pointers, of any number of tensors, which Triton's launcher has no type for.
_NAMES = ("cuda", "cpu")
_kernels.define("adamw", _SCHEMA, lambda *_: None, names=_NAMES)

OP = _dispatch.register(
    _dispatch.Op(
        "adamw",
        _check,
        _kernels.backends(_kernel_reasons, "batch", _NAMES),
        tensor="batch",
    )
)
