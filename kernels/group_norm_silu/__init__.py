"""GroupNorm + SiLU in Triton, with an optional per-channel term (the time embedding) added in front.

Wu and He, "Group Normalization" (2018), arXiv 1803.08494; SiLU: Elfwing et al. (2017), arXiv 1702.03118.

- configuration.py: limits and shapes per GPU, with the reasons;
- tiles.py: which regime and which tile serve a problem;
- forward.py, backward.py: the kernels, and the plan of their launches;
- device.py: device functions that both use;
- specialisations.py: the compiled versions that the ahead-of-time gate checks.

docs/kernels.md explains the design.
"""

from __future__ import annotations

import torch

from ..launch import run_all
from .backward import plan_backward
from .forward import plan_forward
from .specialisations import specialisations

__all__ = ["group_norm_silu", "group_norm_silu_backward", "specialisations"]


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`silu(group_norm(x + add[:, :, None], num_groups, weight, bias, eps))`, computed in float32 and rounded once.

    The caller has checked the arguments; nothing is checked here.

    Args:
        x: (N, C, *spatial), float32, float16 or bfloat16, N > 0. Read as (N, C, S), each image is contiguous or has
            its channels last (stride 1 along C, any stride >= C along S); images may lie further apart. On a CUDA
            device, or on the CPU when the process runs Triton's interpreter (TRITON_INTERPRET=1).
        num_groups: G, a divisor of C.
        weight, bias: (C,) in x's dtype or float32, or None for 1 and 0.
        add: (N, C) in x's dtype or float32, any strides, or None for 0.
        eps: added to the variance before its square root.
        silu: whether the SiLU is applied.

    Returns:
        y with x's dtype and the strides of `torch.empty_like(x)`; mean and 1 / sqrt(biased variance + eps) of x +
        add, both (N, G) float32.
    """
    launches, outputs = plan_forward(x, num_groups, weight, bias, add, eps, silu)
    run_all(launches, x.device)
    return outputs


def group_norm_silu_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `group_norm_silu` for x, weight, bias and add. Everything but x, mean and rstd is recomputed.

    Args:
        grad_y: like x but with any strides that can be read as (N, C, S): the other layout, or 0 when it was
            expanded.
        mean, rstd: (N, G) float32, contiguous, as `group_norm_silu` returned them.
        The others as in `group_norm_silu`.

    Returns:
        grad_x with x's dtype and the strides of `torch.empty_like(x)`; grad_weight and grad_bias (C,) float32;
        grad_add (N, C) float32, the sum of grad_x over the pixels before its rounding. All four, whether or not the
        parameter was given.
    """
    launches, outputs = plan_backward(grad_y, x, num_groups, weight, bias, add, mean, rstd, silu)
    run_all(launches, x.device)
    return outputs
