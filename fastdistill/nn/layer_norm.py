"""LayerNorm: a drop-in for `torch.nn.LayerNorm` over the last dimension, with an optional residual sum in front."""

from __future__ import annotations

import torch

from fastdistill.ops import layer_norm


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` over one dimension; same parameters, same state dict.

    Args: as `torch.nn.LayerNorm`, with one normalised dimension, and
        backend: forces a backend of `fastdistill.ops.layer_norm`; None chooses per call.

    Shape: x (..., D). `residual`, like x and optional, is added to it before the norm; then the result is (y, sum).

    Raises:
        ValueError: a normalized_shape of more than one dimension.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"normalized_shape: expected one dimension, got {tuple(self.normalized_shape)}")
        self.backend = backend

    @classmethod
    def from_layer_norm(cls, norm: torch.nn.LayerNorm, *, backend: str | None = None):
        """The same norm, sharing its parameters."""
        fused = cls(norm.normalized_shape, norm.eps, elementwise_affine=False, backend=backend)
        fused.elementwise_affine, fused.weight, fused.bias = norm.elementwise_affine, norm.weight, norm.bias
        return fused.train(norm.training)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual, backend=self.backend)
