"""What a UNet keeps for its backward pass, and what keeping less costs: `python -m fastdistill.bench.activations`.

Counted under fake tensors: nothing is computed, no weights are needed, and a full SDXL UNet takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from diffusers import UNet2DConditionModel
from fastdistill.training.activations import SavedTensors
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastdistill.models import ModelError, resolve_architecture
from fastdistill.models.architectures import Architecture, build_networks, unet_inputs
from fastdistill.nn import patch, unpatch

# FlopCounterMode knows the attention of GPUs alone.
_ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
# What a value written by an op that is no matrix product is taken to cost: an exponential and a few multiplications.
POINTWISE_FLOPS = 20


@dataclass(frozen=True)
class Measured:
    """saved_bytes: alive between forward and backward, parameters excluded. flops: of both passes, with
    `POINTWISE_FLOPS` per value that anything but a matrix product or convolution writes."""

    name: str
    saved_bytes: int
    flops: int


class _PointwiseValues(TorchDispatchMode):
    """Counts the values written by ops that FlopCounterMode gives no FLOPs to; views write none."""

    def __init__(self, counted: dict) -> None:
        super().__init__()
        self.values, self._counted = 0, counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket not in self._counted and not function.is_view:
            self.values += sum(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        return result


def measure(arch: str | Architecture, batch: int, resolution: int, dtype: torch.dtype) -> Iterator[Measured]:
    """Diffusers' UNet as it is, patched, patched with recompute, and with full gradient checkpointing."""
    if isinstance(arch, str):
        arch = resolve_architecture(arch)
    with FakeTensorMode():
        unet = build_networks(arch, dtype, ["unet"])["unet"].train()
        yield _measure("diffusers", unet, arch, batch, resolution, dtype)
        patch(unet)
        yield _measure("patched", unet, arch, batch, resolution, dtype)
        patch(unet, recompute=True)
        yield _measure("patched, recompute", unet, arch, batch, resolution, dtype)
        unpatch(unet)
        yield _measure(
            "diffusers, gradient checkpointing",
            unet,
            arch,
            batch,
            resolution,
            dtype,
            lambda saved: unet.enable_gradient_checkpointing(saved.checkpoint),
        )


def _measure(
    name: str,
    unet: UNet2DConditionModel,
    arch: Architecture,
    batch: int,
    resolution: int,
    dtype: torch.dtype,
    prepare: Callable[[SavedTensors], None] = lambda _: None,
) -> Measured:
    inputs = unet_inputs(arch, batch, resolution, dtype)
    saved = SavedTensors([*unet.parameters(), *unet.buffers()])
    prepare(saved)
    flops = FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS)
    pointwise = _PointwiseValues(flops.flop_registry)
    with flops, pointwise:
        with saved:
            y = unet(**inputs).sample
        y.sum().backward()
    unet.zero_grad()
    return Measured(name, saved.nbytes, flops.get_total_flops() + POINTWISE_FLOPS * pointwise.values)


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def activations(
    arch: Annotated[str, typer.Option(help="a name that `fastdistill models` lists, or a pipeline folder")] = "sd15",
    batch: Annotated[int, typer.Option(min=1)] = 4,
    resolution: Annotated[int, typer.Option(min=8, help="pixels, a multiple of 8")] = 512,
    dtype: Annotated[str, typer.Option(help=f"of {', '.join(_DTYPES)}")] = "bfloat16",
) -> None:
    """Print what a UNet keeps for its backward pass: as it is, patched, with recompute, with checkpointing."""
    try:
        architecture = resolve_architecture(arch)
    except ModelError as error:
        raise typer.BadParameter(str(error), param_hint="--arch") from error
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"{dtype!r}: unknown; known: {', '.join(_DTYPES)}", param_hint="--dtype")
    if resolution % 8:
        raise typer.BadParameter(f"{resolution}: must be a multiple of 8 pixels", param_hint="--resolution")
    table = Table(title=f"{arch} UNet, batch {batch}, {resolution} px, {dtype}: forward and backward")
    for heading, justify in (("", "left"), ("saved GiB", "right"), ("of diffusers", "right"), ("arithmetic", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)
    first = None
    for row in measure(architecture, batch, resolution, _DTYPES[dtype]):
        first = first or row
        table.add_row(
            row.name,
            f"{row.saved_bytes / 2**30:.2f}",
            f"{row.saved_bytes / first.saved_bytes:.3f}",
            f"{row.flops / first.flops:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    app(prog_name="python -m fastdistill.bench.activations")
