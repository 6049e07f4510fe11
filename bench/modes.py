"""What one measured step does with a provider's function: forward, backward or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .benchmark import Inputs


@dataclass(frozen=True)
class Step:
    """`run()` makes the tensors named in `results`, fresh at each call."""

    results: tuple[str, ...]
    run: Callable[[], object]

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.results, _as_tuple(self.run()), strict=True))


def forward(call: Callable[..., object], inputs: Inputs) -> Step:
    """The outputs, as in inference: no input needs a gradient."""
    arguments = {**inputs.tensors, **inputs.constants}
    return Step(tuple(inputs.grad_outputs), lambda: call(**arguments))


def backward(call: Callable[..., object], inputs: Inputs) -> Step:
    """The gradients of every tensor, from a forward pass made once, outside."""
    leaves, grad_outputs = _leaves(inputs), tuple(inputs.grad_outputs.values())
    outputs = _as_tuple(call(**leaves, **inputs.constants))
    wanted = tuple(leaves.values())
    return Step(_gradients(leaves), lambda: torch.autograd.grad(outputs, wanted, grad_outputs, retain_graph=True))


def full(call: Callable[..., object], inputs: Inputs) -> Step:
    """Outputs and gradients, as in a training step."""
    leaves, grad_outputs = _leaves(inputs), tuple(inputs.grad_outputs.values())
    arguments, wanted = {**leaves, **inputs.constants}, tuple(leaves.values())

    def run() -> tuple[torch.Tensor, ...]:
        outputs = _as_tuple(call(**arguments))
        return *outputs, *torch.autograd.grad(outputs, wanted, grad_outputs)

    return Step((*inputs.grad_outputs, *_gradients(leaves)), run)


MODES = {"forward": forward, "backward": backward, "full": full}


def _leaves(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}


def _gradients(leaves: dict[str, torch.Tensor]) -> tuple[str, ...]:
    return tuple(f"grad_{name}" for name in leaves)


def _as_tuple(outputs: object) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
