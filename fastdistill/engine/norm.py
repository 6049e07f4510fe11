"""GroupNorm and SiLU inside the engine: one call each way, with the optional time embedding in front."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistill.nn import GroupNormSiLU
from fastdistill.ops import explain, group_norm_silu

_MOST_BINDINGS = 64


class SeparateNormSiLU(torch.nn.Module):
    """`silu(norm(x + add))` by torch's own kernels; what a residual block runs when nothing is fused."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        if add is not None:
            x = x + add[:, :, None, None]
        return F.silu(self.norm(x))


class BoundGroupNormSiLU(GroupNormSiLU):
    """`fastdistill.nn.GroupNormSiLU` that checks its input and chooses its backend once per kind of input.

    Inference sends the same shapes again and again; at 8x8 pixels the check and the choice cost more than the norm
    (12 of 19 microseconds). The choice is that of `fastdistill.ops.explain` at the first call; a FASTDISTILL_BACKEND
    that changes later has no effect. Not differentiable.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._bindings: dict[tuple, functools.partial] = {}

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        kind = (x.shape, x.stride(), x.dtype, x.device, add is None)
        kernel = self._bindings.get(kind)
        if kernel is None:
            kernel = self._bind(kind, x, add)
        return kernel(x, add)

    def _bind(self, kind: tuple, x: Tensor, add: Tensor | None):
        arguments = (self.num_groups, self.weight, self.bias, self.eps)
        backend = explain("group_norm_silu", x, *arguments, silu=self.silu, add=add, backend=self.backend).backend
        if backend == "reference":
            kernel = functools.partial(_reference, arguments, self.silu)
        else:
            raw = getattr(torch.ops.fastdistill.group_norm_silu, backend)
            kernel = functools.partial(_raw, raw, self.num_groups, self.weight, self.bias, self.eps, self.silu)
        if len(self._bindings) >= _MOST_BINDINGS:
            self._bindings.clear()
        self._bindings[kind] = kernel
        return kernel


def _raw(op, num_groups, weight, bias, eps, silu, x, add):
    return op(x, num_groups, weight, bias, add, eps, silu)[0]


def _reference(arguments, silu, x, add):
    return group_norm_silu(x, *arguments, silu=silu, add=add, backend="reference")
