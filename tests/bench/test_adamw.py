"""The benchmark of FusedAdamW: what it times is the same work, and its figures are those of the tensors."""

import pytest
from fastdistill.bench.adamw import _shapes, app, measure
from typer.testing import CliRunner


def test_both_sides_do_the_same_work_and_the_bytes_are_those_of_the_state():
    both, _, alone, narrow = measure(20_000, 1)
    assert (both.ours_moved, both.torch_moved) == (40, 52)
    assert (alone.ours_moved, alone.torch_moved) == (32, 28)
    assert both.ours_state == pytest.approx(both.torch_state) == pytest.approx(8, abs=0.01)
    assert narrow.ours_state == pytest.approx(2.03, abs=0.05)
    for row in (both, alone):
        assert row.ours_error < 2 * row.torch_error + 1e-3
    assert narrow.ours_error < 0.5  # of a learning rate, in five steps


def test_the_shapes_have_as_many_elements_as_were_asked_for():
    sizes = [1, 320, 50_000_000]
    for size in sizes:
        total = 0
        for shape in _shapes(size):
            elements = 1
            for length in shape:
                elements *= length
            total += elements
        assert total == size


def test_a_device_that_is_not_there_is_named():
    result = CliRunner().invoke(app, ["--device", "cuda", "--params", "10"])
    assert result.exit_code in (0, 2)
    assert result.exit_code == 0 or "torch sees no CUDA device" in result.output
