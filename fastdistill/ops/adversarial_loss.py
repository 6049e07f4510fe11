"""The losses of a discriminator and its generator over any number of heads, all heads at once, with what a log needs.

Hinge: Lim and Ye, arXiv 1705.02894. Softplus, the non-saturating logistic loss: Goodfellow et al., arXiv 1406.2661.
`fastdistill.losses` has each under its own name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastdistill.ops import _dispatch, _kernels
from fastdistill.ops._layout import like, samples_in_step

FUNCTIONS = ("hinge", "linear", "softplus")
COLUMNS = ("loss", "mean", "positive", "negative", "sign")  # of the statistics
Tensors = Sequence[torch.Tensor]


def adversarial_loss(
    up: Tensors,
    down: Tensors = (),
    *,
    function: str = "hinge",
    heads: str = "mean",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over heads of mean f(-logits) for the heads in `up` and of mean f(logits) for those in `down`.

    A step down its gradient raises the logits in `up` and lowers those in `down`: a discriminator has real logits in
    `up` and fake ones in `down`, a generator fake ones in `up`.

    Args:
        up, down: a tensor of logits per head, each of any shape and of float32, float16, bfloat16 (every backend) or
            float64 (reference), in one list or in both; as many in `down` as in `up`, or none. Read in place where
            their elements are dense in memory, in any order of the dimensions; other strides go to the reference. A
            head without logits contributes 0 and counts as a head.
        function: f(z) is "hinge" relu(1 + z), "linear" z, "softplus" log(1 + exp(z)), all in float32.
        heads: "mean" divides by the number of heads, "sum" does not.
        backend: "cuda", "cpu" or "reference"; None lets `fastdistill.ops.explain` 's first choice serve.

    Returns:
        The loss () and the statistics (2 + len(up) + len(down), 5), float32 (float64 if any logits are). Columns:
        mean f, mean logit, the fraction of logits > 0, of logits < 0, and the mean sign. The first two rows are the
        means over the heads of `up` and of `down` (0 where there are none), then follows a row per head. They stay on
        the device; nothing waits for them.

    Derivatives: only the logits are saved; the first derivative on every backend, higher ones in differentiable
    PyTorch. At a hinge's corner the derivative is 0, as in PyTorch.

    Raises:
        ValueError, TypeError: bad input, naming the argument, before anything is launched.
        BackendError: the backend asked for does not exist or cannot serve the call; the message says why.
    """
    _check(up, down, function=function, heads=heads)
    chosen = _dispatch.select(OP, backend, up, down, function=function, heads=heads)
    weight = 1.0 / len(up) if heads == "mean" else 1.0
    logits = [*up, *down]
    if chosen == _dispatch.REFERENCE:
        return reference(logits, len(up), function, weight)
    if torch.is_grad_enabled() and any(t.requires_grad for t in logits):
        return _AdversarialLoss.apply(len(up), function, weight, chosen, *logits)
    return _forward(chosen)(logits, len(up), function, weight)


def reference(logits: Tensors, ups: int, function: str, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch, differentiable as often as needed; the first `ups` of the logits are those of `up`."""
    dtype = _dtype(logits)
    wide = [t.to(dtype) for t in logits]
    losses = torch.stack([_mean(_value(function, -t if i < ups else t)) for i, t in enumerate(wide)])
    with torch.no_grad():
        columns = [losses, *(torch.stack([_mean(f(t)) for t in wide]) for f in (_itself, _positive, _negative))]
        rows = torch.stack([*columns, columns[2] - columns[3]], dim=1)
        groups = [rows[:ups].mean(0), rows[ups:].mean(0) if len(logits) > ups else torch.zeros_like(rows[0])]
        statistics = torch.cat([torch.stack(groups), rows])
    return weight * losses.sum(), statistics


def reference_gradient(
    grad_loss: torch.Tensor, logits: Tensors, ups: int, function: str, weight: float
) -> list[torch.Tensor]:
    """dL/dlogits in plain PyTorch, itself differentiable."""
    found = []
    for i, t in enumerate(logits):
        z = t.to(_dtype([t]))
        z = -z if i < ups else z
        slope = {"hinge": lambda z: (1 + z > 0).to(z.dtype), "linear": torch.ones_like, "softplus": torch.sigmoid}
        scale = grad_loss.to(z.dtype) * ((-weight if i < ups else weight) / max(t.numel(), 1))
        found.append(like((scale * slope[function](z)).to(t.dtype), t))
    return found


def gradient(
    grad_loss: torch.Tensor, logits: Tensors, ups: int, function: str, weight: float, backend: str
) -> list[torch.Tensor]:
    """dL/dlogits on `backend`; where it must be differentiable, in plain PyTorch."""
    if torch.is_grad_enabled() and (grad_loss.requires_grad or any(t.requires_grad for t in logits)):
        return reference_gradient(grad_loss, logits, ups, function, weight)
    return _backward(backend)(grad_loss, logits, ups, function, weight)


def _value(function: str, z: torch.Tensor) -> torch.Tensor:
    return {"hinge": lambda z: F.relu(1 + z), "linear": _itself, "softplus": F.softplus}[function](z)


def _itself(z: torch.Tensor) -> torch.Tensor:
    return z


def _positive(z: torch.Tensor) -> torch.Tensor:
    return (z > 0).to(z.dtype)


def _negative(z: torch.Tensor) -> torch.Tensor:
    return (z < 0).to(z.dtype)


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.sum() / max(values.numel(), 1)


def _dtype(logits: Tensors) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in logits) else torch.float32


def _check(up, down=(), *, function="hinge", heads="mean") -> None:
    if function not in FUNCTIONS:
        raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}; got {function!r}")
    if heads not in ("mean", "sum"):
        raise ValueError(f"heads must be 'mean' or 'sum'; got {heads!r}")
    for name, logits in (("up", up), ("down", down)):
        check_logits(name, logits)
    if not up:
        raise ValueError("up: expected the logits of at least one head, got none")
    if down and len(down) != len(up):
        raise ValueError(f"down: expected as many heads as up, {len(up)}, or none; got {len(down)}")
    for i, t in enumerate((*up, *down)):
        if t.device != up[0].device:
            raise ValueError(f"logits of head {i % len(up)} are on {t.device}, those of the first on {up[0].device}")


def check_logits(name: str, logits) -> None:
    """A list of floating tensors, or an error that names the one that is not."""
    if not isinstance(logits, (list, tuple)):
        raise TypeError(f"{name}: expected a list of tensors, got {type(logits).__name__}")
    for i, t in enumerate(logits):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(t).__name__}")
        if t.dtype not in (*_kernels.DTYPES, torch.float64):
            raise TypeError(f"{name}[{i}]: expected float32, float16, bfloat16 or float64, got {t.dtype}")


def _kernel_reasons(up, down=(), *, function="hinge", heads="mean") -> list[str]:
    """What no kernel serves, whoever wrote it."""
    reasons = []
    logits = (*up, *down)
    if any(t.dtype == torch.float64 for t in logits):
        reasons.append("float64 is served by the reference alone")
    for i, t in enumerate(logits):
        if not (t.is_contiguous() or samples_in_step(t.unsqueeze(0))):
            name = f"up[{i}]" if i < len(up) else f"down[{i - len(up)}]"
            reasons.append(f"{name} has strides {tuple(t.stride())}: its elements must be dense in memory")
    return reasons


# ---- the registered ops: one overload per backend -------------------------------------------------------------------

_NAMES = ("cuda", "cpu")


def _forward_fake(logits, ups, function, weight):
    first = logits[0]
    return (
        first.new_empty((), dtype=torch.float32),
        first.new_empty((2 + len(logits), len(COLUMNS)), dtype=torch.float32),
    )


def _backward_fake(grad_loss, logits, ups, function, weight):
    return [torch.empty_like(t) for t in logits]


_SETTINGS = "Tensor[] logits, int ups, str function, float weight"
_kernels.define("adversarial_loss", f"({_SETTINGS}) -> (Tensor, Tensor)", _forward_fake, names=_NAMES)
_kernels.define(
    "adversarial_loss_backward", f"(Tensor grad_loss, {_SETTINGS}) -> Tensor[]", _backward_fake, names=_NAMES
)


def _forward(backend: str):
    return getattr(torch.ops.fastdistill.adversarial_loss, backend)


def _backward(backend: str):
    return getattr(torch.ops.fastdistill.adversarial_loss_backward, backend)


# ---- autograd -------------------------------------------------------------------------------------------------------


class _AdversarialLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ups, function, weight, backend, *logits):
        ctx.save_for_backward(*logits)
        ctx.settings = (ups, function, weight, backend)
        loss, statistics = _forward(backend)(logits, ups, function, weight)
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx, grad_loss, _):
        ups, function, weight, backend = ctx.settings
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        logits = [ctx.saved_tensors[i] for i in wanted]
        found = gradient(grad_loss, logits, sum(i < ups for i in wanted), function, weight, backend)
        grads: list[torch.Tensor | None] = [None] * len(ctx.saved_tensors)
        for i, grad in zip(wanted, found):
            grads[i] = grad
        return None, None, None, None, *grads


OP = _dispatch.register(
    _dispatch.Op("adversarial_loss", _check, _kernels.backends(_kernel_reasons, "up", _NAMES), tensor="up")
)
