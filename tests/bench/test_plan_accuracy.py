"""The plan against torch's profiler, which counts what the allocator was asked for."""

import pytest
from fastdistill.bench.plan_accuracy import app, compare
from typer.testing import CliRunner


@pytest.mark.parametrize("method", ["dmd", "dmd2", "add", "reflow"])
def test_the_plan_is_within_a_tenth_of_the_profilers_peak(method):
    assert compare(method, batch=4).ratio == pytest.approx(1, abs=0.1)


def test_an_unknown_method_is_refused():
    refused = CliRunner().invoke(app, ["dmd3"])
    assert refused.exit_code == 2
    assert "dmd2" in refused.output
