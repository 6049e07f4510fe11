"""attention on every backend: results and gradients against float64, over the shapes of diffusion models."""

import pytest
import torch

from fastdistill.ops import attention
from fastdistill.ops._dispatch import ops
from fastdistill.ops.attention import _forward
from tests.ops.attention_oracle import BACKENDS, check_against_exact, make, on_every_backend, on_every_kernel
from tests.ops.backends import in_every_dtype

# (B, H, N, M, D): the head dims of SD1.5, SD2.1, SDXL, ViT-S and the VAE, self and text attention, with few tokens; odd
# numbers of either, one key, one query, one head dim that is no library's favourite.
SHAPES = [
    (2, 2, 64, 64, 40),
    (1, 2, 64, 77, 40),
    (1, 2, 64, 64, 80),
    (1, 2, 33, 77, 80),
    (1, 2, 40, 40, 160),
    (2, 1, 16, 77, 160),
    (1, 3, 64, 64, 64),
    (2, 2, 50, 77, 64),
    (1, 2, 197, 197, 64),
    (1, 1, 33, 257, 64),
    (1, 1, 48, 48, 512),
    (1, 1, 63, 65, 80),
    (1, 1, 37, 41, 512),
    (1, 2, 1, 5, 64),
    (2, 1, 9, 1, 40),
    (1, 1, 131, 259, 8),
    (1, 2, 7, 130, 96),
    (1, 1, 5, 6, 264),
]


@on_every_backend
@in_every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda v: "x".join(map(str, v)))
def test_result_and_gradients_equal_float64(backend, device, shape, dtype):
    check_against_exact(backend, device, *make(shape, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "sdpa", "sdpa:cudnn", "sdpa:flash", "sdpa:efficient"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, 4096, 4096, 40),
        (1, 8, 1024, 77, 80),
        (2, 8, 256, 256, 160),
        (1, 5, 4095, 4095, 64),
        (1, 1, 4096, 4096, 512),
    ],
    ids=lambda v: "x".join(map(str, v)),
)
def test_the_sites_of_the_models_equal_float64(backend, shape):
    check_against_exact(backend, "cuda", *make(shape, torch.bfloat16, "cuda"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_rounds_once(dtype):
    inputs = make((1, 2, 9, 70, 40), dtype)
    wide = attention(*(t.float() for t in inputs), backend="reference")
    assert torch.equal(attention(*inputs, backend="reference"), wide.to(dtype))


@on_every_kernel
@in_every_dtype
@pytest.mark.parametrize("keys", [77, 300])
def test_the_log_sum_exp_is_the_natural_one_in_float32(backend, device, dtype, keys):
    q, k, v = make((1, 2, 20, keys, 40), dtype, device)
    _, lse = _forward(backend)(q, k, v, 0.25)
    exact = torch.logsumexp((q.double() @ k.double().mT) * 0.25, dim=-1)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    # Products of 40 values in float32, from inputs that are exact.
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5 if dtype != torch.float32 else 2e-3)


def test_every_backend_of_the_op_is_tested():
    assert {b.values[0] for b in BACKENDS} == {b.name for b in ops()["attention"].backends}
