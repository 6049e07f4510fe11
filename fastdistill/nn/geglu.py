"""GEGLU: a drop-in for the module of that name in diffusers, a projection followed by `h * gelu(gate)`."""

from __future__ import annotations

import torch

from fastdistill.ops import geglu


class GEGLU(torch.nn.Module):
    """`geglu(proj(x))`; same parameters, same state dict as `diffusers.models.activations.GEGLU`.

    Args:
        dim_in: size of the last dimension of x.
        dim_out: D, that of the result; `proj` is a Linear from dim_in to 2 D.
        bias: whether `proj` has one.
        backend: forces a backend of `fastdistill.ops.geglu`; None chooses per call.

    Shape: x (..., dim_in); the result (..., dim_out) in the dtype of the projection.
    """

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True, *, backend: str | None = None) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(dim_in, 2 * dim_out, bias=bias)
        self.backend = backend

    @classmethod
    def from_geglu(cls, module: torch.nn.Module, *, backend: str | None = None):
        """The same layer around the same projection, whatever that is wrapped in."""
        fused = cls.__new__(cls)
        torch.nn.Module.__init__(fused)
        fused.proj, fused.backend = module.proj, backend
        return fused.train(module.training)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return geglu(self.proj(hidden_states), backend=self.backend)
