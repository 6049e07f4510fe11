"""Other people's work: measured where it is, a row with the reason where it is not."""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch
from fastdistill.bench import geglu, group_norm_silu, layer_norm, peers
from fastdistill.bench.benchmark import Inputs
from fastdistill.bench.runner import Selection, run

CUDA = Inputs({"x": torch.zeros(1, device="meta")}, {})


class OnCuda:
    device = torch.device("cuda")


def test_a_peer_needs_a_gpu():
    provider = peers.peer("liger", "liger_kernel.ops.geglu", lambda module: module.call)
    assert provider.missing(Inputs({"x": torch.zeros(1)}, {})) == ["needs a CUDA tensor, got cpu"]


def test_a_peer_that_is_not_installed_is_a_reason():
    provider = peers.peer("liger", "no_such_package.ops", lambda module: module.call)
    (reason,) = provider.missing(Inputs({"x": OnCuda()}, {}))
    assert reason == "no_such_package.ops cannot be used: ModuleNotFoundError: No module named 'no_such_package'"


def test_a_peer_of_another_version_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "a_peer", ModuleType("a_peer"))
    (reason,) = peers.peer("a", "a_peer", lambda module: module.call).missing(Inputs({"x": OnCuda()}, {}))
    assert reason == "a_peer cannot be used: AttributeError: module 'a_peer' has no attribute 'call'"


def rows_with(benchmark, provider, case):
    selection = Selection(
        benchmark, benchmark.select_cases([case]), (provider,), ("forward",), ("float32",), ("contiguous",), pairs=1
    )
    return list(run(selection))


def test_a_peer_that_raises_is_missing_and_one_of_ours_is_a_failure():
    def broken(**_):
        raise RuntimeError("no kernel\nfor this")

    provider = peers.Provider("broken", lambda _: broken)
    benchmark = group_norm_silu.BENCHMARK
    (row,) = rows_with(benchmark, provider, "1280x8x8")
    assert (row.status, row.missing) == ("raised", "raised RuntimeError: no kernel for this")
    (row,) = rows_with(benchmark, dataclasses.replace(provider, peer=True), "1280x8x8")
    assert (row.status, row.missing) == ("missing", "raised RuntimeError: no kernel for this")


# Each peer's function, imitated from its signature: what is tested is that it is called as it wants to be.


class Function:
    """An autograd Function by its `apply`."""

    def __init__(self, apply):
        self.apply = apply


def liger_group_norm(x, weight, bias, num_channels, num_groups, eps):
    assert num_channels == x.shape[1]
    return torch.nn.functional.group_norm(x, num_groups, weight, bias, eps)


def liger_layer_norm(x, weight, bias, eps):
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def liger_geglu(a, b):
    return torch.nn.functional.gelu(a, approximate="tanh") * b


def flash_attn_layer_norm(x, weight, bias, residual=None, *, eps=1e-6, prenorm=False):
    total = x if residual is None else x + residual
    y = liger_layer_norm(total, weight, bias, eps)
    return (y, total) if prenorm else y


def quack_layer_norm(x, weight, bias=None, eps=1e-6):
    assert x.dim() == 2
    assert weight.dtype == bias.dtype == torch.float32
    return liger_layer_norm(x, weight.to(x.dtype), bias.to(x.dtype), eps)


def imitation(**functions):
    module = ModuleType("imitation")
    vars(module).update(functions)
    return module


@pytest.mark.parametrize(
    ("module", "name", "imitated", "tolerance"),
    [
        (group_norm_silu, "liger", imitation(LigerGroupNormFunction=Function(liger_group_norm)), 1e-5),
        (layer_norm, "liger", imitation(LigerLayerNormFunction=Function(liger_layer_norm)), 1e-5),
        (layer_norm, "flash_attn", imitation(layer_norm_fn=flash_attn_layer_norm), 1e-5),
        (layer_norm, "quack", imitation(layernorm_fwd=quack_layer_norm), 1e-5),
        (geglu, "liger", imitation(LigerGELUMulFunction=Function(liger_geglu)), 2e-2),  # another function, as noted
    ],
)
def test_a_peer_is_called_as_it_wants_to_be_and_computes_the_op(monkeypatch, module, name, imitated, tolerance):
    monkeypatch.setattr("importlib.import_module", lambda _: imitated)
    (provider,) = module.BENCHMARK.select_providers([name])
    assert provider.peer
    cases = [case for case in module.BENCHMARK.cases if case.shape[0] == 64 or case.name == "1280x8x8"]
    for case in cases:
        if name == "quack" and case.variant:
            continue
        inputs = module.BENCHMARK.setup(case, torch.float32, "contiguous", torch.device("cpu"))
        adapted = provider.adapt(inputs)
        ours = provider.prepare(adapted)(**adapted.tensors, **adapted.constants)
        exact = module.eager(**inputs.tensors, **inputs.constants)
        torch.testing.assert_close(ours, exact, atol=tolerance, rtol=tolerance)
