"""The tolerance rule, and which result a row shows."""

import pytest
import torch
from fastdistill.bench.accuracy import allowed_error, compare

T = torch.tensor


@pytest.mark.parametrize(
    ("dtype", "large_mean", "floor"),
    [
        (torch.float32, False, 2e-6),
        (torch.float32, True, 1e-5),
        (torch.float16, False, 2**-11),
        (torch.float16, True, 2**-11),
        (torch.bfloat16, False, 2**-8),
    ],
)
def test_twice_the_baselines_error_and_a_floor_are_allowed(dtype, large_mean, floor):
    assert allowed_error(0.0, 0.1, dtype, large_mean=large_mean) == pytest.approx(floor)
    assert allowed_error(0.5, 4.0, dtype, large_mean=large_mean) == pytest.approx(1.0 + 4 * floor)


def test_errors_are_the_largest_differences_from_the_exact_result():
    exact = {"y": T([1.0, -2.0], dtype=torch.float64)}
    found = compare({"y": T([1.25, -2.0])}, {"y": T([1.0, -2.5])}, exact, torch.float32)
    assert (found.error, found.baseline_error) == (0.25, 0.5)
    assert found.allowed == pytest.approx(1.0 + 2 * 2e-6)
    assert found.ok


def test_the_result_nearest_to_its_limit_is_shown():
    exact = {"y": T([1.0], dtype=torch.float64), "grad_x": T([100.0], dtype=torch.float64)}
    ours = {"y": T([1.00001]), "grad_x": T([100.00001])}  # the smaller relative error has the larger limit
    found = compare(ours, {name: t.float() for name, t in exact.items()}, exact, torch.float32)
    assert found.result == "y"
    assert not found.ok


def test_a_nan_fails_and_is_shown_first():
    exact = {"y": T([1.0], dtype=torch.float64), "grad_x": T([1.0], dtype=torch.float64)}
    ours = {"y": T([9.0]), "grad_x": T([float("nan")])}
    found = compare(ours, {name: t.float() for name, t in exact.items()}, exact, torch.float32)
    assert found.result == "grad_x"
    assert not found.ok
