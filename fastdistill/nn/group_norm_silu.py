"""GroupNormSiLU: a drop-in for `GroupNorm` followed by `SiLU`."""

from __future__ import annotations

import torch

from fastdistill.ops import group_norm_silu


class GroupNormSiLU(torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` and `SiLU` as one op; same parameters, same state dict as `torch.nn.GroupNorm`.

    Args: as `torch.nn.GroupNorm`, and
        silu: False makes it a plain (fused) GroupNorm.
        backend: forces a backend of `fastdistill.ops.group_norm_silu`; None chooses per call.

    Shape: x (N, C, *spatial) with 2 to 5 dimensions; `add` (N, C), optional, is added to x before the norm.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        silu: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.silu = silu
        self.backend = backend

    @classmethod
    def from_group_norm(cls, norm: torch.nn.GroupNorm, *, silu: bool = True, backend: str | None = None):
        """The same norm, sharing its parameters."""
        fused = cls(norm.num_groups, norm.num_channels, norm.eps, affine=False, silu=silu, backend=backend)
        fused.affine, fused.weight, fused.bias = norm.affine, norm.weight, norm.bias
        return fused.train(norm.training)

    def forward(self, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        return group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, silu=self.silu, add=add, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, silu={self.silu}"
