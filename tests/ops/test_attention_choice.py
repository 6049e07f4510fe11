"""Which backend serves a call of attention, and what it says of those that do not."""

import types
import warnings

import pytest
import torch
import torch.nn.functional as F

from fastdistill.ops import BackendError, attention, attention_sdpa, explain
from fastdistill.ops._dispatch import ops
from tests.ops.attention_oracle import STRIDES, check_against_exact, is_in_token_order, lying, make


def test_explain_names_the_kernel_the_table_and_every_reason():
    q, k, v = make((1, 2, 64, 77, 40), torch.bfloat16)
    explanation = explain("attention", q, k, v)
    assert explanation.backend == "sdpa"
    assert explanation.reasons["sdpa:cudnn"] == ["needs a CUDA tensor, got cpu"]
    assert list(explanation.reasons) == [b.name for b in ops()["attention"].backends]
    assert explain("attention", q=q, k=k, v=v) == explanation
    text = str(explanation)
    assert f"served by sdpa (torch's flash kernel for CPUs, torch {torch.__version__})" in text
    assert "choice: rule 3 of " in text
    assert "default.json (estimates, not measured): triton, sdpa: all keys fit one tile" in text


def test_explain_says_where_a_copy_follows():
    notes = explain("attention", *make((1, 2, 64, 77, 40))).notes
    assert notes["sdpa:math"].endswith("its result is copied to (B, N, H, D) order")
    assert "copied" not in notes["sdpa:flash"]


@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("name", ["sdpa:flash", "sdpa:math"])
def test_a_copy_follows_where_it_is_said_to(name, how):
    q, k, v = lying(how, torch.float32, "cpu")
    with torch.nn.attention.sdpa_kernel(attention_sdpa.KERNELS[name]):
        written = F.scaled_dot_product_attention(q, k, v)
    said = attention_sdpa.describe(name, q, k, v)
    assert is_in_token_order(written) == ("copied" not in said)


def test_what_torch_chooses_is_what_runs():
    q, k, v = make((1, 2, 64, 77, 40))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(q, k, v, backend="sdpa")
        attention(q, k, v, backend="sdpa:math")
    names = [event.name for event in profile.events() if event.name.startswith("aten::_scaled_dot_product")]
    assert attention_sdpa.chosen_by_torch(q, k, v) == "sdpa:flash"
    assert names == ["aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"]


def as_on_a_gpu(monkeypatch, can_use):
    """The reasons for tensors on the CPU, asked as if they were on a GPU."""
    monkeypatch.setattr(attention_sdpa, "_can_use", can_use)

    def reasons(name, *tensors):
        q = types.SimpleNamespace(
            device=torch.device("cuda"), **{n: getattr(tensors[0], n) for n in ("dtype", "shape", "stride")}
        )
        q.data_ptr, q.element_size = tensors[0].data_ptr, tensors[0].element_size
        return attention_sdpa.reasons(name, q, *tensors[1:])

    return reasons


def test_a_kernel_that_torch_refuses_is_refused_in_torchs_words(monkeypatch):
    def refuse(name, *_, debug):
        if debug:
            warnings.warn(f"{name}  needs sm80. (Triggered internally at ../sdp_utils.cpp:1.)", stacklevel=1)
        return False

    inputs = make((1, 2, 3, 4, 40), torch.float16)
    reasons = as_on_a_gpu(monkeypatch, refuse)
    assert reasons("sdpa:flash", *inputs) == ["sdpa:flash needs sm80."]
    assert reasons("sdpa:math", *inputs) == []
    assert reasons("sdpa", *inputs) == []
    reasons = as_on_a_gpu(monkeypatch, lambda *_, debug: False)
    assert reasons("sdpa:cudnn", *inputs) == ["torch says that it cannot, not why"]


def test_what_torch_would_load_from_a_crooked_address_is_refused(monkeypatch):
    reasons = as_on_a_gpu(monkeypatch, lambda *_, debug: True)
    straight = make((1, 2, 3, 4, 40), torch.float16)
    late = lying("late", torch.float16, "cpu")
    wide = [torch.randn(1, 1, 3, 44, dtype=torch.float16)[..., :40]]
    for name in ("sdpa", "sdpa:flash", "sdpa:efficient", "sdpa:cudnn"):
        assert reasons(name, *straight) == []
        assert [reason[:9] for reason in reasons(name, *late)] == ["q begins ", "k begins ", "v begins "]
        (found,) = reasons(name, straight[0], wide[0], straight[2])
        assert "k begins 0 bytes after a multiple of 16, strides (132, 132, 44, 1): needs" in found
    assert reasons("sdpa:math", *late) == []


def test_float64_is_the_references():
    explanation = explain("attention", *(t.double() for t in make((1, 2, 4, 5, 40))))
    assert explanation.backend == "reference"
    assert explanation.reasons["sdpa"] == ["float64 is served by the reference alone"]
    assert "float64 is served by the reference alone" in explanation.reasons["triton"]


@pytest.mark.parametrize("width", [4, 20, 516, 520])
def test_head_dims_that_our_kernels_do_not_take_are_named(width):
    explanation = explain("attention", *make((1, 1, 3, 4, width)))
    assert f"head dim {width}: needs a multiple of 8 up to 512" in explanation.reasons["triton"]
    assert explanation.backend == "sdpa"
    check_against_exact("reference", "cpu", *make((1, 1, 3, 4, width)))


def test_forcing_a_backend_that_cannot_serve_raises_with_its_reasons(monkeypatch):
    inputs = make((1, 1, 3, 4, 40))
    with pytest.raises(BackendError, match="'sdpa:cudnn' cannot serve this call: needs a CUDA tensor, got cpu"):
        attention(*inputs, backend="sdpa:cudnn")
    with pytest.raises(BackendError, match="attention has no backend 'xformers'; it has: sdpa, sdpa:cudnn, "):
        attention(*inputs, backend="xformers")
    monkeypatch.setenv("FASTDISTILL_BACKEND", "attention=sdpa:math")
    assert explain("attention", *inputs).backend == "sdpa:math"
    assert explain("attention", *inputs, backend="sdpa").backend == "sdpa"
