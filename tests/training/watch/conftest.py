"""What several of these tests need."""

import io

import pytest
from fastdistill.training.watch import watching
from PIL import Image


@pytest.fixture
def few_curves(monkeypatch):
    """One pixel each: drawing takes time, and is tested elsewhere."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    monkeypatch.setattr(watching, "plot_png", lambda lines, group, colours: file.getvalue())
