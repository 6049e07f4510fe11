"""What a loss keeps for its backward pass and holds at its peak: `python -m fastdistill.bench.loss_memory`.

Fused losses against the same as one writes them, forward and backward. Counted are bytes beyond the inputs and their
gradients, each storage once, on the CPU: what is allocated there is allocated on a GPU. Tensors are counted; beside
them the C++ kernel of `lpips_distance` has a scratch of at most 266 KiB per thread for features of up to 1024 channels.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import typer
from fastdistill.training.activations import SavedTensors
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdistill import diffusion, losses

from . import lpips_distance
from .report import print_wide

Loss = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """A loss twice: `eager(**inputs)` and `fused(**inputs)`. The inputs that require a gradient are what it trains."""

    name: str
    eager: Loss
    fused: Loss
    inputs: Callable[[], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Memory:
    """Bytes beyond the inputs and their gradients: kept from the forward to the backward pass, and at most at a time.

    Results of a few bytes (the loss, its gradient) are in the peak.
    """

    saved: int
    peak: int


def measure(loss: Loss, inputs: dict[str, torch.Tensor]) -> Memory:
    """One forward and one backward pass."""
    saved = SavedTensors(inputs.values())
    with saved:
        loss(**inputs)
    with _LiveStorages(inputs.values()) as live:
        value = loss(**inputs)
        gradients = torch.autograd.grad(value, [t for t in inputs.values() if t.requires_grad])
        live.leave_out(gradients)
    return Memory(saved.nbytes, live.peak)


class _LiveStorages(TorchDispatchMode):
    """Notes after every op which storages live that were made meanwhile."""

    def __init__(self, owned: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._owned = {_address(t) for t in owned}
        self._count = itertools.count()
        self._numbers: dict[int, int] = {}  # of the living, by address; a number is never used again, an address is
        self._bytes: dict[int, int] = {}
        self._moments: list[frozenset[int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and _address(t) not in self._owned and _address(t) not in self._numbers:
                number = self._numbers[_address(t)] = next(self._count)
                self._bytes[number] = t.untyped_storage().nbytes()
                weakref.finalize(t.untyped_storage(), self._numbers.pop, _address(t))
        self._moments.append(frozenset(self._numbers.values()))
        return result

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """These, which still live, are not counted."""
        for t in tensors:
            self._bytes[self._numbers[_address(t)]] = 0

    @property
    def peak(self) -> int:
        """The most bytes at a time."""
        return max(sum(self._bytes[number] for number in moment) for moment in self._moments)


def _address(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata


# ---- the losses -----------------------------------------------------------------------------------------------------

_PIXELS, _LATENTS = (2, 3, 128, 128), (8, 4, 64, 64)


def _over_batch(value: torch.Tensor) -> torch.Tensor:
    return value.view(-1, 1, 1, 1)


def _batch(shape: tuple[int, ...], dtype: torch.dtype, trained: str, *others: str) -> dict[str, torch.Tensor]:
    """`trained` in `dtype`, the others in float32, alpha and sigma per sample."""
    alpha, sigma = diffusion.scaled_linear().at(torch.randint(0, 1000, shape[:1]))
    inputs = {trained: torch.randn(shape).to(dtype).requires_grad_()}
    return inputs | {name: torch.randn(shape) for name in others} | {"alpha": alpha, "sigma": sigma}


def _eager_add(x_student, x_teacher, alpha, sigma):
    distances = ((x_student - x_teacher.detach()) ** 2).mean(dim=(1, 2, 3))
    return (alpha * distances).mean()


def _eager_flow(v_pred, data, noise, alpha, sigma):
    return F.mse_loss(v_pred.float(), data - noise)


def _flow(v_pred, data, noise, alpha, sigma):
    return losses.flow_matching_loss(v_pred, data, noise, convention="instaflow")


def _eager_denoising(pred, data, noise, alpha, sigma):
    snr = alpha**2 / sigma**2
    weight = snr.clamp(max=5.0) / (snr + 1)
    target = _over_batch(alpha) * noise - _over_batch(sigma) * data
    distances = F.mse_loss(pred.float(), target, reduction="none").mean(dim=(1, 2, 3))
    return (weight * distances).mean()


def _denoising(pred, data, noise, alpha, sigma):
    return losses.denoising_loss(pred, data, noise, alpha, sigma, prediction_type="v_prediction", weighting="min_snr")


def _eager_dmd(x, x_t, pred_real, pred_fake, alpha, sigma):
    alpha, sigma = _over_batch(alpha), _over_batch(sigma)
    with torch.no_grad():
        mu_real, mu_fake = ((x_t - sigma * pred) / alpha for pred in (pred_real, pred_fake))
        gradient = torch.nan_to_num((mu_fake - mu_real) / (x - mu_real).abs().mean(dim=(1, 2, 3), keepdim=True))
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def _lists(tensors: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
    """(features_x, features_y, weights) from "x0", "y0", "w0", "x1", …"""
    return tuple([t for name, t in tensors.items() if name[0] == kind] for kind in "xyw")


def _vgg16() -> dict[str, torch.Tensor]:
    layers = zip(*lpips_distance.inputs())
    return {f"{kind}{k}": t for k, layer in enumerate(layers) for kind, t in zip("xyw", layer)}


COMPARISONS = (
    Comparison(
        "lpips_distance, the layers of VGG16 at 64 pixels, float32",
        lambda **tensors: lpips_distance.eager(*_lists(tensors)).mean(),
        lambda **tensors: losses.lpips_distance(*_lists(tensors)).mean(),
        _vgg16,
    ),
    Comparison(
        "add_distillation_loss, pixels float32",
        _eager_add,
        losses.add_distillation_loss,
        lambda: _batch(_PIXELS, torch.float32, "x_student", "x_teacher"),
    ),
    Comparison(
        "add_distillation_loss, pixels bfloat16, teacher float32",
        _eager_add,
        losses.add_distillation_loss,
        lambda: _batch(_PIXELS, torch.bfloat16, "x_student", "x_teacher"),
    ),
    Comparison(
        "flow_matching_loss, latents bfloat16, data float32",
        _eager_flow,
        _flow,
        lambda: _batch(_LATENTS, torch.bfloat16, "v_pred", "data", "noise"),
    ),
    Comparison(
        "denoising_loss, v, min_snr, latents bfloat16, data float32",
        _eager_denoising,
        _denoising,
        lambda: _batch(_LATENTS, torch.bfloat16, "pred", "data", "noise"),
    ),
)


# Its gradient is made in the forward pass, and kept: in float32 a tensor like x.
DMD = Comparison(
    "dmd_loss, latents float32",
    _eager_dmd,
    losses.dmd_loss,
    lambda: _batch(_LATENTS, torch.float32, "x", "x_t", "pred_real", "pred_fake"),
)


# ---- the command ----------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def loss_memory() -> None:
    """Print for each loss what is kept for the backward pass, and the most that lives at a time, eager and fused."""
    table = Table(title="KiB beyond the inputs and their gradients, forward and backward")
    for heading in ("", "saved, eager", "fused", "peak, eager", "fused"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for each in (*COMPARISONS, DMD):
        inputs = each.inputs()
        eager, fused = measure(each.eager, inputs), measure(each.fused, inputs)
        bytes_of = (eager.saved, fused.saved, eager.peak, fused.peak)
        table.add_row(each.name, *(f"{n / 1024:.2f}" for n in bytes_of))
    print_wide(Console(), table)


if __name__ == "__main__":
    app(prog_name="python -m fastdistill.bench.loss_memory")
