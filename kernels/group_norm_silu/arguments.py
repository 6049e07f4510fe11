"""Kernel arguments that several kernels take alike."""

from __future__ import annotations

import torch

from .tiles import ncs_strides

Arguments = dict[str, torch.Tensor | int | float | None]


def stride_arguments(**tensors: torch.Tensor) -> Arguments:
    """`x_stride_n`, `x_stride_c`, `x_stride_s` for a tensor passed as `x`."""
    return {
        f"{name}_stride_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip("ncs", ncs_strides(tensor))
    }


def channel_arguments(weight: torch.Tensor | None, bias: torch.Tensor | None, add: torch.Tensor | None) -> Arguments:
    """The per-channel parameters. A missing one is None and its strides 1: both are compiled in and cost nothing."""
    return {
        "weight_ptr": weight,
        "bias_ptr": bias,
        "add_ptr": add,
        "weight_stride": 1 if weight is None else weight.stride(0),
        "bias_stride": 1 if bias is None else bias.stride(0),
        "add_stride_n": 1 if add is None else add.stride(0),
        "add_stride_c": 1 if add is None else add.stride(1),
    }
