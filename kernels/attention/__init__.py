"""Attention in Triton, for the shapes of diffusion models.

FlashAttention-2: Dao (2023), arXiv 2307.08691; online softmax: Milakov and Gimelshein (2018), arXiv 1805.02867.

- tiles.py: which tiles serve a problem, with the reasons;
- forward.py, backward.py: the kernels over many keys, and the plans of the launches;
- short.py: the kernels over so few keys that a program holds them all;
- device.py: device functions that all use; plan.py: what the plans have in common;
- specialisations.py: the compiled versions that the ahead-of-time gate checks.

docs/kernels.md explains the design.
"""

from __future__ import annotations

import torch

from ..launch import run_all
from .backward import plan_backward
from .forward import plan_forward
from .specialisations import specialisations

__all__ = ["attention", "attention_backward", "specialisations"]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v, with the softmax and all sums in float32.

    The caller has checked the arguments; nothing is checked here.

    Args:
        q: (B, H, N, D), float32, float16 or bfloat16, N >= 1, D a multiple of 8 up to 512. The last stride is 1, the
            others are any. On a CUDA device, or on the CPU when the process runs Triton's interpreter
            (TRITON_INTERPRET=1).
        k, v: (B, H, M, D), M >= 1, otherwise like q; strides of 0 will do.
        scale: of the logits.

    Returns:
        o (B, H, N, D) in q's dtype, with (B, N, H, D) memory order; lse (B, H, N) float32, contiguous: the natural
        logarithm of the sum over the keys of exp(scale q k^T).
    """
    launches, outputs = plan_forward(q, k, v, scale)
    run_all(launches, q.device)
    return outputs


def attention_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attention` for q, k and v. The attention weights are recomputed from lse.

    Args:
        grad_o: (B, H, N, D) in q's dtype, last stride 1, the others any.
        o, lse: as `attention` returned them.
        The others as in `attention`.

    Returns:
        grad_q, grad_k and grad_v in q's dtype, with (B, N, H, D) and (B, M, H, D) memory order.
    """
    launches, outputs = plan_backward(grad_o, q, k, v, o, lse, scale)
    run_all(launches, q.device)
    return outputs
