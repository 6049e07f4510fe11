"""The sliced Wasserstein distance against one dimension, where scipy and closed forms know it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from fastdistill.metrics import sliced_wasserstein

values = st.lists(st.integers(-20, 20), min_size=1, max_size=12)


@given(values, values)
@settings(max_examples=60, deadline=None)
def test_in_one_dimension_it_is_the_exact_distance_of_any_two_numbers_of_samples(a, b):
    columns = [np.array(rows, dtype=float)[:, None] for rows in (a, b)]
    assert sliced_wasserstein(*columns, projections=3, p=1) == pytest.approx(wasserstein_distance(a, b), abs=1e-12)
    # W_2 on a common refinement: every value repeated until both have the same number
    fine_a, fine_b = np.sort(np.repeat(a, len(b))), np.sort(np.repeat(b, len(a)))
    assert sliced_wasserstein(*columns, projections=3) == pytest.approx(
        np.mean((fine_a - fine_b) ** 2.0) ** 0.5, abs=1e-12
    )


@given(st.integers(1, 20), st.floats(0, 10), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_shift_in_one_dimension_is_the_distance(n, shift, seed):
    rows = np.random.default_rng(seed).normal(size=(n, 1))
    for p in (1, 2, 3.5):
        assert sliced_wasserstein(rows, rows + shift, p=p) == pytest.approx(shift, abs=1e-6)


def test_a_shift_in_many_dimensions_is_its_length_over_the_root_of_their_number():
    rows = torch.randn(50, 16, dtype=torch.float64)
    shift = torch.zeros(16, dtype=torch.float64)
    shift[3] = 8
    assert sliced_wasserstein(rows, rows + shift, projections=20_000) == pytest.approx(8 / 4, rel=0.02)


def test_gaussians_of_two_widths_differ_by_the_difference_of_their_widths():
    """W_2 of N(0, 1) and N(0, 9) is 2 in every direction."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, 3, generator=generator)
    assert sliced_wasserstein(rows, 3 * torch.randn(10_000, 3, generator=generator), 64) == pytest.approx(2, rel=0.02)


def test_equal_sets_in_any_order_and_number_of_copies_have_distance_zero():
    rows = torch.randn(30, 4)
    assert sliced_wasserstein(rows, rows.flip(0)) == pytest.approx(0, abs=1e-14)
    assert sliced_wasserstein(rows, rows.repeat(3, 1).numpy()) == pytest.approx(0, abs=1e-14)


def test_the_seed_fixes_the_directions_and_their_number_is_honoured():
    a, b = torch.randn(30, 4), torch.randn(20, 4) + 1
    assert sliced_wasserstein(a, b, 100, seed=1) == sliced_wasserstein(a, b, 100, seed=1)
    assert sliced_wasserstein(a, b, 100, seed=1) != sliced_wasserstein(a, b, 100, seed=2)
    # 100 directions are two chunks; each direction counts once
    one_by_one = [sliced_wasserstein(a[:, :1], b[:, :1], count) for count in (1, 100)]
    assert one_by_one[0] == pytest.approx(one_by_one[1])


@pytest.mark.parametrize(
    ("a", "options", "message"),
    [
        (np.zeros((0, 2)), {}, "a: 0 samples"),
        (np.zeros((3, 3)), {}, "a, b: 3 and 2 features"),
        (np.zeros((3, 2)), {"projections": 0}, "projections=0"),
        (np.zeros((3, 2)), {"p": 0.5}, "p=0.5"),
        (np.zeros((3, 2)), {"p": float("inf")}, "p=inf"),
    ],
)
def test_bad_input_is_named(a, options, message):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(a, np.zeros((4, 2)), **options)
