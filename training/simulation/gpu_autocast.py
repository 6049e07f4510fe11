"""A GPU's autocast on tensors that are on the CPU, whose own keeps norms, powers and exponentials in 16 bits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

# As in ATen/autocast_mode.h: what runs in float32, whatever it is given …
_FLOAT32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt"),
    *("sinh", "tan", "pow", "__pow__", "__rpow__", "softplus", "layer_norm", "native_layer_norm", "rms_norm"),
    *("group_norm", "frobenius_norm", "nuclear_norm", "norm", "cosine_similarity", "poisson_nll_loss"),
    *("cosine_embedding_loss", "nll_loss", "hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss"),
    *("huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss"),
    *("triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits", "dist", "pdist", "cdist"),
    *("renorm", "logsumexp", "interpolate"),
)
# … and what reads 16 bits and computes and returns float32.
_INTO_FLOAT32 = ("prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum")
_HALF = (torch.bfloat16, torch.float16)


def _functions(names: tuple[str, ...]) -> frozenset[Any]:
    homes = (torch, torch.Tensor, F, torch.special)
    return frozenset(getattr(home, name) for name in names for home in homes if hasattr(home, name))


def gpu_autocast(device: str) -> AbstractContextManager:
    """A context in which autocast is that of the device: "cuda", or "cpu" as it is."""
    return GpuAutocast() if device == "cuda" else nullcontext()


class GpuAutocast(TorchFunctionMode):
    """Use as a context: within `torch.autocast("cpu")` what a GPU computes in float32 is so here too."""

    _float32 = _functions(_FLOAT32)
    _into_float32 = _functions(_INTO_FLOAT32)

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.backward:  # where checkpointed blocks are computed again, as they were before
            return self._backward(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            if function in self._float32:
                args = tuple(map(_float, args))
                kwargs = {name: _float(value) for name, value in kwargs.items()}
            elif function in self._into_float32 and _is_half(args[0]):
                kwargs = {"dtype": torch.float32} | kwargs
        return function(*args, **kwargs)

    def _backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
        """Of a scalar. The engine itself is called: every function above it would have this mode left again."""
        with self:
            _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _HALF


def _float(value: Any) -> Any:
    return value.float() if _is_half(value) else value
