"""`--accuracy`: the error of every backend and result, without timing."""

import dataclasses
import io

import pytest
import torch
from fastdistill.bench import attention, errors, geglu
from fastdistill.bench.accuracy import Accuracy
from fastdistill.bench.benchmark import Case, Provider
from fastdistill.bench.cli import app
from fastdistill.bench.runner import Selection
from rich.console import Console
from typer.testing import CliRunner

TINY = (Case((2, 5, 7, 40), ("tiny",)),)


def compute(benchmark, providers, modes=("full",), dtypes=("float32",), cases=TINY):
    selection = Selection(benchmark, cases, tuple(providers), modes, dtypes, benchmark.layouts[:1])
    return errors.compute([selection], Console(file=io.StringIO()))


def off_by(amount, name="wrong", **settings):
    """Attention that is right in what it returns and off in its gradients, by `amount`."""

    def call(q, k, v):
        return attention.eager(q, k, v) + amount * (v.sum() - v.sum().detach())

    return Provider(name, lambda _: call, **settings)


def test_every_result_of_every_provider_has_its_own_error():
    (row,) = compute(attention.BENCHMARK, [off_by(1e-2)])
    assert [each.result for each in row.found] == ["o", "grad_q", "grad_k", "grad_v"]
    inputs = attention.BENCHMARK.setup(TINY[0], torch.float32, "tokens", torch.device("cpu"))
    assert [each.ok for each in row.found] == [True, True, True, False]
    assert 0 < row.found[3].error < 1e-2 * inputs.grad_outputs["o"].numel()
    assert row.failed


def test_modes_dtypes_and_cases_are_all_computed():
    cases = (*TINY, Case((1, 3, 4, 8), ("tiny",)))
    _, by = attention.BENCHMARK.select_providers(["reference", "sdpa:math"])
    rows = compute(attention.BENCHMARK, [by], ("forward", "backward"), ("float32", "bfloat16"), cases)
    assert len(rows) == 8
    assert [each.result for each in rows[0].found] == ["o"]
    assert [each.result for each in rows[-1].found] == ["grad_q", "grad_k", "grad_v"]
    assert not any(row.failed for row in rows)


def test_who_cannot_serve_and_who_raises_have_reasons_and_only_a_peers_are_no_failure():
    def broken(*_, **__):
        raise ZeroDivisionError("no")

    cudnn = attention.BENCHMARK.select_providers(["sdpa:cudnn"])[0]
    rows = compute(attention.BENCHMARK, [cudnn, Provider("mine", lambda _: broken), off_by(1.0, "peer", peer=True)])
    assert [row.missing for row in rows] == ["needs a CUDA tensor, got cpu", "raised ZeroDivisionError: no", ""]
    assert [row.failed for row in rows] == [False, True, False]


def test_cases_that_take_too_long_on_a_cpu_are_computed_in_part(monkeypatch):
    vae, text = (attention.BENCHMARK.select_cases([name])[0] for name in ("1x16384x16384x512", "8x4096x77x40"))
    assert attention.smaller(vae, False).shape == (1, 2048, 16384, 512)
    assert attention.smaller(text, False) == text
    assert attention.smaller(text, True).shape == (1, 33, 77, 40)
    assert attention.smaller(vae, True).shape == (1, 33, 97, 512)
    monkeypatch.setattr(attention, "_CPU_FLOPS", 4 * 2 * 2 * 7 * 40)
    (row,) = compute(attention.BENCHMARK, attention.BENCHMARK.select_providers(["reference"]))
    assert (row.case.name, row.computed.name) == ("2x5x7x40", "2x2x7x40")


def test_only_one_case_of_attention_is_too_large_for_a_cpu():
    reduced = [case.name for case in attention.BENCHMARK.cases if attention.smaller(case, False) != case]
    assert reduced == ["1x16384x16384x512"]


def test_unasked_every_backend_is_computed_but_not_the_baseline():
    names = [provider.name for provider in errors.unasked(attention.BENCHMARK)]
    assert "reference" in names
    assert "triton" in names
    assert "torch" not in names
    assert "torch.compile" not in names


def test_the_interpreters_truncation_doubles_the_rounding_floor():
    found = errors._truncated(Accuracy("y", 0.5, baseline_error=0.1, allowed=2 * 0.1 + 0.3))
    assert found.allowed == pytest.approx(2 * 0.1 + 2 * 0.3)


def test_the_summary_shows_the_result_nearest_to_its_limit():
    (row,) = compute(geglu.BENCHMARK, geglu.BENCHMARK.select_providers(["reference"]), cases=(Case((3, 8), ()),))
    near, far = Accuracy("y", 3.0, 1.0, 4.0), Accuracy("grad_x", 5.0, 9.0, 20.0)
    (line,) = errors.summary([dataclasses.replace(row, found=(far, near))])
    assert line == (
        "geglu full float32 reference: 2 results; nearest to its limit: y at 3x8, 3.0e+00 of 4.0e+00 (torch 1.0e+00)"
    )


def run(*arguments):
    return CliRunner().invoke(app, [*arguments, "--accuracy"])


def test_the_command_prints_a_line_per_result_and_times_nothing(monkeypatch):
    monkeypatch.setattr("fastdistill.bench.execution.run", None)
    result = run("attention", "--shapes", "8x64x77x160", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("attention")]
    of_reference = [line[7] for line in lines if line[1:5] == ["full", "float32", "tokens", "reference"]]
    assert of_reference == ["o", "grad_q", "grad_k", "grad_v"]
    assert "attention triton: not computed at 1 site: needs a CUDA tensor (or TRITON_INTERPRET=1)" in result.stdout
    assert "attention full float32 reference: 4 results; nearest to its limit:" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["engine"], 2, "error: --accuracy computes the errors of ops, not of engine, training"),
        (["geglu", "--shapes", "64x10240", "--providers", "cuda"], 1, "error: nothing was computed"),
    ],
)
def test_nothing_to_compute_is_said(arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr


@pytest.mark.interpreter
def test_the_interpreter_computes_small_cases_of_our_kernels():
    text = attention.BENCHMARK.select_cases(["8x64x77x160"])
    rows = compute(
        attention.BENCHMARK, attention.BENCHMARK.select_providers(["triton"]), ("full",), ("bfloat16",), text
    )
    assert [row.computed.name for row in rows] == ["1x33x77x160"]
    assert len(rows[0].found) == 4
    assert not rows[0].failed
