"""Optimisers.

from fastdistill.optim import FusedAdamW
optimizer = FusedAdamW(model.parameters(), lr=1e-4, max_grad_norm=1.0, ema=list(ema_model.parameters()))
"""

from fastdistill.optim.fused_adamw import FusedAdamW

__all__ = ["FusedAdamW"]
