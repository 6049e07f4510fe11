"""What the tests of every op have in common: its backends, as parametrisations, and how derivatives are taken."""

import pytest
import torch

BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("triton", "cpu", id="triton-interpreted", marks=pytest.mark.interpreter),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]
KERNELS = [b for b in BACKENDS if b.id != "reference"]
COMPILED = [b for b in BACKENDS if b.id != "triton-interpreted"]  # torch.compile does not trace into the interpreter
on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
on_every_kernel = pytest.mark.parametrize(("backend", "device"), KERNELS)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def gradients(function, inputs, grad_y):
    """The result for `inputs` (tensors or None) and the gradients of those that are tensors."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return y.detach(), torch.autograd.grad(y, [t for t in leaves if t is not None], grad_y.to(y.dtype))


def truncates(backend, device, dtype):
    """Triton's interpreter truncates float32 to bfloat16 where the hardware rounds."""
    return (backend, device, dtype) == ("triton", "cpu", torch.bfloat16)
