"""Every op's cases, one benchmark per provider. `pytest bench/ -k "geglu and forward"`, `--all-cases` for all of them.

By default the smallest and one middling shape of each op, both 16 and 32 bit, forward and full. Providers that cannot
run here are skipped with their reason; on a machine without a GPU that is everything that needs one.
"""

import itertools

import pytest
import torch
from fastdistill.bench import accuracy
from fastdistill.bench.benchmark import OPS, load
from fastdistill.bench.modes import MODES
from fastdistill.bench.runner import DTYPES

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _cases(op, everything):
    ordered = sorted(op.cases, key=lambda case: op.cost(case, torch.float32, "forward").bytes)
    return op.cases if everything else (ordered[0], ordered[len(ordered) // 3])


def pytest_generate_tests(metafunc):
    everything = metafunc.config.getoption("--all-cases")
    parameters, names = [], []
    for device, op in itertools.product(DEVICES, map(load, OPS)):
        providers = [p for p in (*op.select_providers(None), op.baseline) if device == "cuda" or not _needs_gpu(p)]
        settings = (
            op.select_providers(["all"]) if everything else providers,
            MODES if everything else ("forward", "full"),
            DTYPES if everything else ("float32", "bfloat16"),
            op.layouts,
            _cases(op, everything),
        )
        for provider, mode, dtype, layout, case in itertools.product(*settings):
            parameters.append((device, op, provider, mode, dtype, layout, case))
            names.append(f"{op.op}-{provider.name}-{mode}-{dtype}-{layout}-{case.name}-{device}")
    metafunc.parametrize(("device", "op", "provider", "mode", "dtype", "layout", "case"), parameters, ids=names)


def _needs_gpu(provider):
    return provider.name in ("cuda", "triton")


def test_speed(benchmark, device, op, provider, mode, dtype, layout, case):
    torch.manual_seed(0)
    inputs = op.setup(case, DTYPES[dtype], layout, torch.device(device))
    reasons = provider.missing(inputs)
    if reasons:
        pytest.skip("; ".join(reasons))
    make_step = MODES[mode]
    step = make_step(provider.prepare(inputs), provider.adapt(inputs))
    theirs = op.baseline.prepare(inputs)
    errors = accuracy.compare(
        step.tensors(),
        make_step(theirs, inputs).tensors(),
        make_step(theirs, inputs.to(torch.float64)).tensors(),
        DTYPES[dtype],
    )
    assert errors.ok or provider.peer, errors
    benchmark.group = f"{op.op} {mode} {dtype} {layout} {case.name} {device}"
    benchmark.extra_info.update(error=errors.error, allowed=errors.allowed)

    def run():
        result = step.run()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark(run)
