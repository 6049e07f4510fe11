"""Markers that depend on the machine or on how the process was started."""

import os
import shutil

import pytest
import torch


def pytest_collection_modifyitems(config, items):
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    # A process either interprets Triton kernels or compiles them: `make test` runs one pytest of each kind.
    other = [item for item in items if ("interpreter" in item.keywords) != interpreting]
    if other:
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if item not in set(other)]
    # Not by `-m "not long"` in addopts: any other -m on the command line would bring them back.
    long = [item for item in items if "long" in item.keywords and "long" not in (config.option.markexpr or "")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in set(long)]
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if "nvcc" in item.keywords and not (shutil.which("nvcc") or os.path.exists("/usr/local/cuda/bin/nvcc")):
            item.add_marker(pytest.mark.skip(reason="needs nvcc"))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
