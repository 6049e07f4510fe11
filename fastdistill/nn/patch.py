"""Fused ops in any diffusers UNet or autoencoder, in place and reversible: `patch(model)`, `unpatch(model)`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastdistill.nn.attention import FusedAttnProcessor
from fastdistill.nn.joint import join_where_it_pays, separate

OPS = ("group_norm_silu", "layer_norm", "geglu", "attention")
_DEFERRED_NORM = "deferred_norm"
_REPLACED_PROCESSOR = "replaced_processor"


@dataclass(frozen=True)
class PatchReport:
    """What `patch` changed, with counts, and what it left, with the reason; `str()` of it is meant to be read."""

    changed: dict[str, int]
    left: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{count} x {what}" for what, count in self.changed.items()] or ["nothing was changed"]
        return "\n".join([*lines, *(f"left: {count} x {what}" for what, count in self.left.items())])


def patch(model: torch.nn.Module, ops: Iterable[str] = OPS, *, recompute: bool = False) -> PatchReport:
    """Let a model's modules run on the fused ops: the same numbers to rounding, in training and inference.

    Modules change their class or their attention processor, and (except on a CPU) the projections of an attention move
    side by side in memory, nothing else: parameters (and an optimiser that holds them), state dict, hooks, modes and
    names stay. A model that is patched already is restored first.

    Args:
        model: anything that holds diffusers' modules, such as `UNet2DConditionModel` or `AutoencoderKL`. Changed in
            place.
        ops: of "group_norm_silu" (residual blocks with their time embedding, output norms, norms in front of
            attention), "layer_norm" (with the residual sum in front of it), "geglu", and "attention" (by one
            `FusedAttnProcessor`, in place of diffusers' plain processor alone, with `join_projections`).
        recompute: save less for the backward pass, and compute it again there: what a convolution or a linear layer
            needs of its input is recomputed from the input of the norm or GEGLU in front of it, which is saved anyway.
            Costs no matrix product.

    Raises:
        TypeError: `model` is not a module. ValueError: `ops` names an unknown one.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    ops = (ops,) if isinstance(ops, str) else tuple(ops)
    for op in ops:
        if op not in OPS:
            raise ValueError(f"ops: unknown op {op!r}; known: {', '.join(OPS)}")
    from fastdistill.nn import sites  # imports diffusers

    unpatch(model)
    changed: Counter[str] = Counter()
    left: Counter[str] = Counter()
    processor = FusedAttnProcessor()
    for site in sites.find(model, ops, recompute):
        if site.reason:
            left[f"{site.what}: {site.reason}"] += 1
        else:
            changed[site.what] += 1
            for module, patched in site.classes.items():
                module.__class__ = patched
            for conv, norm in site.deferred_norms.items():
                conv.__dict__[_DEFERRED_NORM] = norm  # not as a submodule: it keeps its place and its name
            if site.attention is not None:
                site.attention.__dict__[_REPLACED_PROCESSOR] = site.attention.processor
                site.attention.processor = processor
                join_where_it_pays(site.attention)
    return PatchReport(dict(changed), dict(left))


def unpatch(model: torch.nn.Module) -> int:
    """Give every module that `patch` changed its own class back; returns how many there were."""
    count = 0
    for module in model.modules():
        processor = module.__dict__.pop(_REPLACED_PROCESSOR, None)
        if processor is not None:
            separate(module)
            if isinstance(module.processor, FusedAttnProcessor):  # not somebody's later choice
                module.processor = processor
        replaced = getattr(type(module), "replaces", None)
        if replaced is not None:
            module.__class__ = replaced
            module.__dict__.pop(_DEFERRED_NORM, None)
        count += processor is not None or replaced is not None
    return count
