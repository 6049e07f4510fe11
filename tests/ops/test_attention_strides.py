"""attention on tensors in any order in memory, unaligned ones and parts of larger ones among them."""

import pytest
import torch

from fastdistill.ops import explain
from tests.ops.attention_oracle import (
    NOT_TORCHS_ON_GPU,
    STRIDES,
    check_against_exact,
    lying,
    make,
    on_every_backend,
    on_every_kernel,
)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", STRIDES)
def test_tensors_may_lie_in_any_strides(backend, device, how, dtype):
    check_against_exact(backend, device, *lying(how, dtype, device))


@on_every_kernel
@pytest.mark.parametrize("how", STRIDES)
def test_our_kernels_read_every_order_in_place(backend, device, how):
    q, k, v = lying(how, torch.float32, device)
    assert explain("attention", q, k, v, backend=backend).backend == backend


@on_every_backend
@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_values_of_a_head_that_do_not_lie_side_by_side_are_served_all_the_same(backend, device, which):
    inputs = [*make((1, 2, 10, 12, 40), torch.float32, device)]
    inputs[which] = inputs[which].mT.contiguous().mT
    found = explain("attention", *inputs)
    if backend == "triton":
        assert any("needs the last one to be 1" in reason for reason in found.reasons["triton"])
        assert found.backend != "triton"
    if not found.reasons[backend]:
        check_against_exact(backend, device, *inputs)


@pytest.mark.parametrize(("backend", "device"), NOT_TORCHS_ON_GPU)
@pytest.mark.parametrize("arrival", ["expanded", "head by head", "wider", "transposed"])
def test_the_gradient_may_arrive_in_any_strides(backend, device, arrival):
    q, k, v = make((2, 2, 10, 12, 40), torch.float32, device)
    grad_o = {
        "expanded": torch.tensor(0.7).expand(2, 2, 10, 40),
        "head by head": torch.randn(2, 2, 10, 40),
        "wider": torch.randn(2, 2, 10, 60)[..., 3:43],
        "transposed": torch.randn(2, 2, 40, 10).mT,
    }[arrival]
    check_against_exact(backend, device, q, k, v, grad_o=grad_o)
