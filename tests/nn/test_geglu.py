"""The GEGLU module beside diffusers'."""

import subprocess
import sys

import pytest
import torch
from diffusers.models.activations import GEGLU as DiffusersGEGLU

from fastdistill.nn import GEGLU


def test_computes_what_diffusers_computes_from_the_same_state_dict():
    theirs = DiffusersGEGLU(24, 34)
    ours = GEGLU(24, 34)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).sum().backward()
    theirs(x).sum().backward()
    torch.testing.assert_close(ours.proj.weight.grad, theirs.proj.weight.grad)
    torch.testing.assert_close(ours.proj.bias.grad, theirs.proj.bias.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_keeps_the_dtype_of_the_projection(dtype):
    theirs = DiffusersGEGLU(24, 34, bias=False).to(dtype)
    ours = GEGLU.from_geglu(theirs)
    x = torch.randn(2, 5, 24, dtype=dtype)
    assert ours(x).dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)


def test_from_geglu_shares_the_projection_and_keeps_the_mode():
    theirs = DiffusersGEGLU(8, 6).eval()
    ours = GEGLU.from_geglu(theirs, backend="reference")
    assert ours.proj is theirs.proj
    assert not ours.training
    assert ours.backend == "reference"
    assert [name for name, _ in ours.named_parameters()] == ["proj.weight", "proj.bias"]


def test_follows_the_projection_under_autocast():
    layer = GEGLU(8, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16


def test_importing_the_modules_does_not_import_diffusers():
    check = "import fastdistill.nn, fastdistill.nn.recompute, sys; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
