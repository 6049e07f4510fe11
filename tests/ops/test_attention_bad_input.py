"""Bad input to attention is refused before anything is launched."""

import pytest
import torch

from fastdistill.ops import attention


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
        ({"q": torch.ones(2, 5, 8)}, ValueError, "q: expected (B, H, N, D), got shape (2, 5, 8)"),
        ({"q": torch.ones(2, 3, 5, 8, dtype=torch.int32)}, TypeError, "q: expected float32, .* got torch.int32"),
        ({"q": torch.ones(2, 3, 5, 0)}, ValueError, "q: needs a head dimension D >= 1, got shape (2, 3, 5, 0)"),
        ({"k": None}, TypeError, "k: expected a tensor, got NoneType"),
        ({"k": torch.ones(2, 3, 8)}, ValueError, "k: expected (B, H, M, D), got shape (2, 3, 8)"),
        ({"k": torch.ones(2, 3, 7, 8).half()}, TypeError, "k: expected q's dtype torch.float32, got torch.float16"),
        ({"k": torch.ones(2, 3, 7, 16)}, ValueError, "k: expected shape (2, 3, M, 8), got (2, 3, 7, 16)"),
        ({"k": torch.ones(2, 1, 7, 8)}, ValueError, "k: expected shape (2, 3, M, 8), got (2, 1, 7, 8)"),
        ({"k": torch.ones(2, 3, 0, 8)}, ValueError, "k: needs at least one key, got shape (2, 3, 0, 8)"),
        ({"k": torch.ones(2, 3, 7, 8, device="meta")}, ValueError, "k: expected on q's device cpu, got meta"),
        ({"v": torch.ones(2, 3, 6, 8)}, ValueError, "v: expected k's shape (2, 3, 7, 8), got (2, 3, 6, 8)"),
        ({"v": torch.ones(2, 3, 7, 4)}, ValueError, "v: expected k's shape (2, 3, 7, 8), got (2, 3, 7, 4)"),
        ({"v": torch.ones(2, 3, 7, 8).bfloat16()}, TypeError, "v: expected q's dtype torch.float32, got"),
        ({"scale": "1"}, TypeError, "scale: expected a float or None, got str"),
        ({"scale": True}, TypeError, "scale: expected a float or None, got bool"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference", "triton"])
def test_bad_input_names_the_argument_the_value_and_the_need(change, error, message, backend):
    message = message.replace("(", r"\(").replace(")", r"\)")
    good = {"q": torch.ones(2, 3, 5, 8), "k": torch.ones(2, 3, 7, 8), "v": torch.ones(2, 3, 7, 8)}
    with pytest.raises(error, match=message):
        attention(**{**good, **change}, backend=backend)
