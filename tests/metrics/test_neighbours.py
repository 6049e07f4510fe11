"""Precision and recall on manifolds whose cover is known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistill.metrics import precision_recall


def by_definition(real, fake, k):
    def covered(points, members):
        distances = np.linalg.norm(members[:, None] - members, axis=2)
        radii = np.sort(distances, axis=1)[:, k]  # column 0 is the member itself
        return np.mean([(np.linalg.norm(members - point, axis=1) <= radii).any() for point in points])

    return covered(fake, real), covered(real, fake)


@given(st.integers(5, 30), st.integers(5, 30), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_it_is_what_the_paper_defines_whatever_the_chunk(n, m, columns, k, seed):
    generator = np.random.default_rng(seed)
    real, fake = generator.normal(size=(n, columns)), generator.normal(size=(m, columns)) + 0.5
    expected = pytest.approx(by_definition(real, fake, k))
    assert precision_recall(real, fake, k) == expected
    assert precision_recall(real, fake, k, rows=3) == expected


@given(st.integers(0, 99), st.sampled_from([0.0, 1e6]))
@settings(max_examples=20, deadline=None)
def test_equal_sets_cover_each_other_and_duplicates_do_no_harm(seed, offset):
    rows = np.random.default_rng(seed).normal(size=(8, 3)) + offset
    assert precision_recall(rows, rows[::-1].copy()) == (1, 1)
    copies = np.repeat(rows, 5, axis=0)  # balls of radius 0
    assert precision_recall(copies, rows.repeat(4, axis=0)) == (1, 1)


def test_one_mode_of_two_has_full_precision_and_half_the_recall():
    generator = np.random.default_rng(0)
    left, right = generator.uniform(size=(200, 2)), generator.uniform(size=(200, 2)) + 100
    precision, recall = precision_recall(np.concatenate([left, right]), left)
    assert (precision, recall) == (1, 0.5)


def test_samples_off_the_manifold_cost_precision_alone():
    real = np.random.default_rng(0).uniform(size=(100, 2))
    strays = np.arange(50)[:, None] * [50.0, 0] + 1000  # so far from each other that no three are near a real one
    precision, recall = precision_recall(real, np.concatenate([real, strays]))
    assert precision == pytest.approx(100 / 150)
    assert recall == 1


def test_a_point_on_the_sphere_counts_as_inside():
    real = torch.arange(5.0)[:, None]  # k = 1: every ball has radius 1
    assert precision_recall(real, torch.tensor([[-1.0], [5.0], [-1.01], [5.01]]), k=1).precision == 0.5


@pytest.mark.parametrize("scale", [0.1, 0.3, 1 / 7, 2**0.5])
def test_rounding_throws_nobody_off_the_sphere(scale):
    real = scale * torch.arange(5, dtype=torch.float64)[:, None]
    ends = scale * torch.tensor([[-1.0], [5.0], [-1.0], [5.0]], dtype=torch.float64)
    assert precision_recall(real, ends, k=1).precision == 1


def test_a_common_offset_costs_no_digits():
    generator = np.random.default_rng(0)
    # multiples of 2^-10, to which 1e8 is added without rounding
    real, fake = (generator.integers(-2048, 2048, size=(40, 3)) / 1024 + shift for shift in (0.0, 0.5))
    expected = precision_recall(real, fake)
    assert 0 < expected.precision < 1
    assert precision_recall(real + 1e8, fake + 1e8) == expected


def test_tensors_and_arrays_count_the_same():
    real, fake = torch.randn(20, 3), torch.randn(30, 3)
    assert precision_recall(real, fake) == precision_recall(real.numpy(), fake)
    assert precision_recall(real, fake).recall == precision_recall(fake, real).precision


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (3, {}, "real: 3 samples; needed 4 or more"),
        (9, {"k": 0}, "k=0"),
        (9, {"k": 9}, "real: 9 samples; needed 10"),
        (9, {"rows": 0}, "rows=0"),
    ],
)
def test_bad_input_is_named(rows, options, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(np.zeros((rows, 2)), np.zeros((20, 2)), **options)
