"""What the autograd of every op has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Tensors = Sequence[torch.Tensor | None]


def through_pytorch(function: Callable[..., Tensors], inputs: Tensors, grad_outputs: Tensors) -> list:
    """The gradients of `function(*inputs)` by each input, by running it again in differentiable PyTorch.

    An input, an output or the gradient of an output may be None. Where gradients are enabled (`create_graph`) the
    results are differentiable in turn.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A fresh leaf per input where nothing further will be differentiated; the graph's own tensor otherwise.
        leaves = [t if t is None or (create_graph and t.requires_grad) else t.detach().requires_grad_() for t in inputs]
        pairs = [(o, g) for o, g in zip(function(*leaves), grad_outputs) if o is not None and g is not None]
        if not pairs:
            return [None] * len(inputs)
        outputs, seeds = zip(*pairs)
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(outputs, wanted, seeds, create_graph=create_graph, allow_unused=True))
    return [None if t is None else next(found) for t in leaves]


def needed(gradients: Tensors, needs: Sequence[bool]) -> list:
    """The gradients that are asked for, None in place of the others."""
    return [g if need else None for g, need in zip(gradients, needs)]
