"""What the kernels of every op have in common: where each kind of kernel runs, and how its overload is registered.

An op has one overload per backend that is a kernel: `fastdistill::<op>.cuda`, `.triton`, `.cpu`. The schema and the
fake are defined here, from Python; the compiled libraries add their implementations when they are loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from fastdistill import _native
from fastdistill.ops import _dispatch

NAMES = ("cuda", "triton", "cpu")  # in the order of preference
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what the kernels compute; float64 is the reference's

_LIBRARY = torch.library.Library("fastdistill", "FRAGMENT")


def interpreting() -> bool:
    """Whether this process runs Triton kernels in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def define(
    op: str,
    schema: str,
    fake: Callable[..., object],
    triton: Callable[..., object] | None = None,
    names: tuple[str, ...] = NAMES,
) -> None:
    """Register `fastdistill::<op>.<name>` for every name, with its fake, and the Triton implementation if there is one.

    schema: arguments and results, `(Tensor x, …) -> …`.
    """
    for name in names:
        overload = f"{op}.{name}"
        _LIBRARY.define(overload + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fastdistill::{overload}", fake, lib=_LIBRARY)
    if triton is None:
        return
    for device in ("CUDA", "CPU") if interpreting() else ("CUDA",):
        _LIBRARY.impl(f"{op}.triton", triton, device)


def backends(
    reasons: Callable[..., list[str]], tensor: str = "x", names: tuple[str, ...] = NAMES
) -> tuple[_dispatch.Backend, ...]:
    """The records of an op's kernels and its reference.

    reasons(*args, **kwargs): what no kernel serves, whoever wrote it; called with the op's own arguments, the first of
    which (`tensor`, or a list of them) has the device that decides.
    """

    def device_of(args, kwargs) -> torch.device:
        return _dispatch.device_of(args[0] if args else kwargs[tensor])

    def cpu_supports(*args, **kwargs) -> list[str]:
        device = device_of(args, kwargs)
        wrong_device = [] if device.type == "cpu" else [f"needs a CPU tensor, got {device}"]
        return cpu_available() + wrong_device + reasons(*args, **kwargs)

    def cuda_supports(*args, **kwargs) -> list[str]:
        device = device_of(args, kwargs)
        if device.type != "cuda":
            return [f"needs a CUDA tensor, got {device}", *reasons(*args, **kwargs)]
        return _cuda_device(device.index) + reasons(*args, **kwargs)

    def triton_supports(*args, **kwargs) -> list[str]:
        if device_of(args, kwargs).type == "cuda" or interpreting():
            return triton_available() + reasons(*args, **kwargs)
        return ["needs a CUDA tensor (or TRITON_INTERPRET=1)", *reasons(*args, **kwargs)]

    kernels = (
        _dispatch.Backend("cuda", cuda_supports, cuda_available, "cuda"),
        _dispatch.Backend("triton", triton_supports, triton_available, "cuda"),
        _dispatch.Backend("cpu", cpu_supports, cpu_available, "cpu"),
    )
    served = tuple(kernel for kernel in kernels if kernel.name in names)
    return *served, _dispatch.Backend(_dispatch.REFERENCE, _nothing_against)


@_dispatch.constant
def cpu_available() -> list[str]:
    return [problem] if (problem := _native.cpu_library().problem) else []


def cuda_available() -> list[str]:
    if problem := _native.cuda_library().problem:
        return [problem]
    return [] if torch.cuda.is_available() else ["no CUDA device is visible"]


@_dispatch.constant
def triton_available() -> list[str]:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return [f"triton cannot be imported: {error}"]
    return [] if torch.cuda.is_available() or interpreting() else ["needs a CUDA device (or TRITON_INTERPRET=1)"]


@_dispatch.constant
def _cuda_device(index: int) -> list[str]:
    return [problem] if (problem := _native.cuda_problem(index)) else []


def _nothing_against(*_, **__) -> list[str]:
    return []
