"""R1, the penalty on a discriminator's gradient at real data: exact, lazy, and two forms without a second derivative.

R1: Mescheder et al., arXiv 1801.04406. Lazy: StyleGAN2, arXiv 1912.04958. Approximate: APT, arXiv 2501.08316. At the
input of each head: ADD, arXiv 2311.17042.

Conventions: D of a sample is the sum of its logits, per head; heads are averaged; the penalty is
`gamma/2 * mean over the batch of |grad_x D|^2`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.losses.adversarial import LogitStats, hinge_discriminator_loss
from fastdistill.losses.frozen import SameRandomness, frozen_state
from fastdistill.ops.attention import _AttentionBackward, _Refusal
from fastdistill.ops.squared_norm import squared_norm

MODES = ("exact", "approximate", "finite_difference")
Discriminator = Callable[..., Tensor | Sequence[Tensor]]
Inputs = Tensor | Sequence[Tensor]


def r1_penalty(
    discriminator: Discriminator,
    x: Inputs,
    *,
    gamma: float,
    mode: str = "exact",
    heads: str = "mean",
    sigma: float = 0.01,
    step: float | None = None,
) -> Tensor:
    """`gamma/2 * mean over the batch of |grad_x D|^2`, to be added to a discriminator's loss on real data.

    All forward passes of one penalty see the same spectral-norm vectors, dropout masks and augmentations, and leave
    buffers (BatchNorm's running statistics) as they were: see `fastdistill.losses.frozen_state`. Random numbers are
    torch's default generators'; others repeat nothing. It runs eagerly, outside `torch.compile` and CUDA graphs, and
    waits for nothing on the device.

    Args:
        discriminator: called with x, returns logits (B, ...) or a list of them, one per head. For a list x it returns
            a list with the logits of head k at x[k], which must depend on no other input.
        x: (B, ...) real data, or a list of head inputs (B, ...), where ADD takes the penalty: the second backward pass
            then goes through the heads alone. Floating point; nothing in front of it receives a gradient.
        gamma: the weight. (ADD's paper has no factor 1/2: its 1e-5 is 2e-5 here.)
        mode: "exact", by double backward. "approximate", `gamma / (2 sigma^2) * (D(x) - D(x + sigma n))^2` with normal
            noise n: equal in expectation up to order sigma^2, in two forward passes; in 16 bits sigma must stand out of
            the rounding of x and of the logits. "finite_difference": the value of the exact penalty, and its gradient
            in the parameters to order step^2, also where samples are coupled (batch statistics), by first derivatives
            alone: three forward passes, in float32 whatever autocast says.
        heads: "mean" or "sum". For a tensor x: of D, whose gradient is then taken, so with "mean" a single gradient of
            the mean. For a list x: of the penalties of the heads, each of which has a gradient of its own.
        sigma: of the noise of "approximate".
        step: length of the step of "finite_difference" along the normalised gradient of the whole batch, for each
            input; None is 0.01 times the input's norm over the batch.

    Returns:
        A float32 scalar (float64 for float64 inputs), differentiable once in the parameters (any number of times in
        mode "exact"). A gradient of 0, or an empty batch, gives 0.

    Raises:
        RuntimeError: mode "exact" on a discriminator with an operation that has no second derivative, such as flash
            attention; the message names what else there is.
        ValueError, TypeError: bad input, naming the argument.
    """
    _check_settings(gamma, mode, heads, sigma, step)
    inputs, is_list = _as_inputs("x", x)
    critic = _Critic(discriminator, is_list, heads)
    with frozen_state(discriminator):
        if mode == "exact":
            inputs = _leaves(inputs)
            with torch.enable_grad():
                scores = critic.scores(critic.logits(inputs))
            return _exact(scores, inputs, gamma * critic.weight(inputs))
        if mode == "approximate":
            return _approximate(critic, inputs, gamma, sigma)
        return _finite_difference(critic, inputs, gamma, step)


@dataclass(frozen=True)
class LazyR1:
    """The exact penalty every `interval` steps, as an optimiser step of its own (StyleGAN2, appendix B).

    ```python
    lazy = LazyR1(16)
    optimizer = torch.optim.Adam(discriminator.parameters(), **lazy.optimizer_kwargs(lr=2e-3, betas=(0.0, 0.99)))
    for step, real in enumerate(data):
        hinge_discriminator_loss(discriminator(real), discriminator(fake)).backward()
        optimizer.step(); optimizer.zero_grad()
        if lazy.due(step):
            lazy.penalty(discriminator, real, gamma=10.0).backward()
            optimizer.step(); optimizer.zero_grad()
    ```

    It holds no state: the step is the loop's.
    """

    interval: int

    def __post_init__(self) -> None:
        if not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"interval must be a whole number of steps, at least 1; got {self.interval!r}")

    def due(self, step: int) -> bool:
        """Whether the penalty's step follows the ordinary step of this number, which counts from 0."""
        return step % self.interval == 0

    @property
    def ratio(self) -> float:
        """k / (k + 1) for an interval of k: the ordinary steps among all steps."""
        return self.interval / (self.interval + 1)

    def optimizer_kwargs(self, lr: float, betas: tuple[float, float]) -> dict[str, object]:
        """`lr * ratio` and `betas ** ratio`: with its additional steps the optimiser moves and forgets as without."""
        return {"lr": lr * self.ratio, "betas": tuple(beta**self.ratio for beta in betas)}

    def penalty(self, discriminator: Discriminator, x: Inputs, *, gamma: float, **settings) -> Tensor:
        """`r1_penalty` times the interval; the other arguments as there."""
        return self.interval * r1_penalty(discriminator, x, gamma=gamma, **settings)


class HingeR1Stats(NamedTuple):
    """Of a discriminator's step, as tensors on its device.

    Attributes:
        hinge: () the hinge loss alone.
        penalty: () R1 alone, with gamma.
        real, fake: `LogitStats`.
    """

    hinge: Tensor
    penalty: Tensor
    real: LogitStats
    fake: LogitStats


def hinge_r1_loss(
    discriminator: Discriminator,
    real: Inputs,
    fake: Inputs,
    *,
    gamma: float,
    mode: str = "exact",
    heads: str = "mean",
    sigma: float = 0.01,
    step: float | None = None,
) -> tuple[Tensor, HingeR1Stats]:
    """A discriminator's whole step: `hinge_discriminator_loss` on real and fake, and `r1_penalty` on real.

    The discriminator is called with real and then with fake, as in any loop: spectral norms iterate and running
    statistics move. In mode "exact" the penalty is taken of that first call; the other modes call again, frozen.
    gamma = 0 leaves the penalty out.

    Args:
        real, fake: (B, ...), or lists of head inputs; batches may differ. Neither receives a gradient.
        discriminator, gamma, mode, heads, sigma, step: as in `r1_penalty`.

    Returns:
        (scalar, `HingeR1Stats`).
    """
    _check_settings(gamma, mode, heads, sigma, step)
    real_inputs, is_list = _as_inputs("real", real)
    fake_inputs, fake_is_list = _as_inputs("fake", fake)
    if is_list != fake_is_list:
        raise ValueError("real and fake must both be tensors or both lists of head inputs")
    critic = _Critic(discriminator, is_list, heads)
    shared = mode == "exact" and gamma > 0 and torch.is_grad_enabled()
    real_inputs = _leaves(real_inputs) if shared else [t.detach() for t in real_inputs]
    real_logits = critic.logits(real_inputs)
    fake_logits = critic.logits([t.detach() for t in fake_inputs])
    hinge, stats = hinge_discriminator_loss(real_logits, fake_logits, heads=heads, return_stats=True)
    if shared:
        penalty = _exact(critic.scores(real_logits), real_inputs, gamma * critic.weight(real_inputs))
    elif gamma > 0:
        penalty = r1_penalty(discriminator, real, gamma=gamma, mode=mode, heads=heads, sigma=sigma, step=step)
    else:
        penalty = torch.zeros_like(hinge)
    return hinge + penalty, HingeR1Stats(hinge.detach(), penalty.detach(), *stats)


@dataclass(frozen=True)
class _Critic:
    """The discriminator and how its heads are counted."""

    discriminator: Discriminator
    is_list: bool  # of head inputs
    heads: str

    def logits(self, inputs: list[Tensor]) -> list[Tensor]:
        found = self.discriminator(inputs if self.is_list else inputs[0])
        found = [found] if isinstance(found, Tensor) else list(found)
        if self.is_list and len(found) != len(inputs):
            raise ValueError(
                f"discriminator must return the logits of each of the {len(inputs)} head inputs; got {len(found)}"
            )
        for k, logits in enumerate(found):
            if not isinstance(logits, Tensor) or logits.dim() < 1 or logits.shape[0] != inputs[0].shape[0]:
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(
                    f"discriminator: the logits of head {k} must be ({inputs[0].shape[0]}, ...); got {got}"
                )
        return found

    def scores(self, logits: list[Tensor]) -> list[Tensor]:
        """D (B,): of each head input its own head's, of a single input that of all heads together."""
        each = [_wide(t).flatten(1).sum(1) if t.dim() > 1 else _wide(t) for t in logits]
        if self.is_list:
            return each
        together = torch.stack(each).sum(0)
        return [together / len(each) if self.heads == "mean" else together]

    def weight(self, inputs: list[Tensor]) -> float:
        """Of each head input's penalty."""
        return 1 / len(inputs) if self.heads == "mean" else 1.0


def _exact(scores: list[Tensor], inputs: list[Tensor], gamma: float) -> Tensor:
    create_graph = torch.is_grad_enabled()
    try:
        grads = _gradients(scores, inputs, create_graph)
    except RuntimeError as error:
        if "is not implemented" in str(error) or "differentiate twice" in str(error):
            raise _no_second_derivative(str(error)) from error
        raise
    if create_graph:
        for grad in grads:
            _refuse_first_order_operations(grad)
    return 0.5 * gamma * _mean(squared_norm(grads))


def _approximate(critic: _Critic, inputs: list[Tensor], gamma: float, sigma: float) -> Tensor:
    inputs = [t.detach() for t in inputs]
    noisy = [t + sigma * torch.randn_like(t) for t in inputs]
    randomness = SameRandomness(inputs[0].device)
    here = critic.logits(inputs)
    randomness.begin()
    there = critic.logits(noisy)
    differences = critic.scores([_wide(a) - _wide(b) for a, b in zip(here, there, strict=True)])
    weight = gamma * critic.weight(inputs) / (2 * sigma * sigma)
    return weight * torch.stack([_mean(each.square()) for each in differences]).sum()


def _finite_difference(critic: _Critic, inputs: list[Tensor], gamma: float, step: float | None) -> Tensor:
    with torch.autocast(inputs[0].device.type, enabled=False):
        inputs = _leaves([_wide(t) for t in inputs])
        randomness = SameRandomness(inputs[0].device)
        with torch.enable_grad():
            grads = _gradients(critic.scores(critic.logits(inputs)), inputs, create_graph=False)
        inputs = [t.detach() for t in inputs]
        norms = [torch.linalg.vector_norm(g) for g in grads]
        steps = [_step_of(t) if step is None else step for t in inputs]
        # Where a gradient is 0 there is no direction, and nothing to move.
        moves = [h * g / n.clamp(min=torch.finfo(n.dtype).tiny) for h, g, n in zip(steps, grads, norms)]
        sides = []
        for side in (1, -1):
            randomness.begin()
            sides.append(critic.logits([t + side * move for t, move in zip(inputs, moves)]))
        differences = critic.scores([_wide(a) - _wide(b) for a, b in zip(*sides, strict=True)])
        slopes = [n / (2 * h) * _mean(each) for n, h, each in zip(norms, steps, differences, strict=True)]
        gamma = gamma * critic.weight(inputs)
        surrogate = gamma * torch.stack(slopes).sum()
        # The surrogate's gradient is the penalty's, its value is twice the penalty.
        return surrogate - surrogate.detach() + 0.5 * gamma * _mean(squared_norm(grads))


def _step_of(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x)
    return torch.where(norm > 0, 0.01 * norm, 0.01)


def _gradients(scores: list[Tensor], inputs: list[Tensor], create_graph: bool) -> list[Tensor]:
    with torch.enable_grad():
        total = torch.stack([each.sum() for each in scores]).sum()
    if not total.requires_grad:
        raise ValueError("discriminator: its logits do not depend on x in a way that autograd can follow")
    return list(torch.autograd.grad(total, inputs, create_graph=create_graph, materialize_grads=True))


def _refuse_first_order_operations(grad: Tensor) -> None:
    """Raises where the graph of a gradient holds a node that would only raise in the caller's backward pass."""
    seen, waiting = set(), [grad.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        ours = getattr(node, "_forward_cls", None) in (_AttentionBackward, _Refusal)
        if ours or name in ("torch::autograd::NotImplemented", "torch::autograd::Error"):
            users = sorted({after.name() for after, _ in node.next_functions if after is not None})
            raise _no_second_derivative(f"an operation behind {', '.join(users) or name} has first derivatives only")
        waiting.extend(after for after, _ in node.next_functions)


def _no_second_derivative(reason: str) -> RuntimeError:
    return RuntimeError(
        f'r1_penalty: mode="exact" needs second derivatives of the discriminator, but {reason}. Use '
        'mode="approximate" or mode="finite_difference", which need none; or run its attention with '
        'torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or fastdistill.ops.attention(..., backend="reference"), and '
        "LazyR1 to pay for that every few steps only"
    )


def _leaves(inputs: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in inputs]


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.float64 if t.dtype == torch.float64 else torch.float32)


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(values.numel(), 1)


def _as_inputs(name: str, x: Inputs) -> tuple[list[Tensor], bool]:
    is_list = not isinstance(x, Tensor)
    if is_list and not isinstance(x, (list, tuple)):
        raise TypeError(f"{name}: expected a tensor or a list of head inputs, got {type(x).__name__}")
    inputs = list(x) if is_list else [x]
    if not inputs:
        raise ValueError(f"{name}: expected at least one head input, got none")
    for k, t in enumerate(inputs):
        which = f"{name}[{k}]" if is_list else name
        if not isinstance(t, Tensor):
            raise TypeError(f"{which}: expected a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{which}: expected floating point, got {t.dtype}")
        if t.dim() < 1 or t.shape[0] != inputs[0].shape[0]:
            raise ValueError(f"{which}: expected (B, ...), B as in the first; got shape {tuple(t.shape)}")
    return inputs, is_list


def _check_settings(gamma: float, mode: str, heads: str, sigma: float, step: float | None) -> None:
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be a finite number >= 0; got {gamma}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    if heads not in ("mean", "sum"):
        raise ValueError(f"heads must be 'mean' or 'sum'; got {heads!r}")
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be a finite number > 0; got {sigma}")
    if step is not None and not (math.isfinite(step) and step > 0):
        raise ValueError(f"step must be a finite number > 0, or None; got {step}")
