"""The Frechet distance: closed forms, scipy, few samples, and the same figure when samples come in pieces."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from fastdistill._output import OutputError
from fastdistill.metrics import FrechetStatistics, frechet_distance


def sample(seed, rows, columns, shift=0.0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(rows, columns)) @ generator.normal(size=(columns, columns)) + shift


def by_scipy(a, b):
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = sqrtm(cov_a @ cov_b).real
    return ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * cross)


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_it_is_zero_to_itself_symmetric_and_never_negative(n, m, columns, seed):
    a, b = sample(seed, n, columns), sample(seed + 1, m, columns, shift=1)
    scale = np.square(a).sum() + np.square(b).sum() + 1
    assert frechet_distance(a, a) <= 1e-12 * scale
    there, back = frechet_distance(a, b), frechet_distance(b, a)
    assert there >= 0
    assert there == pytest.approx(back, abs=1e-7 * scale)


def test_it_equals_the_formula_by_scipy():
    a, b = sample(0, 300, 20), sample(1, 200, 20, shift=0.5)
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-10)


def test_fewer_samples_than_features_have_the_exact_distance():
    """From the centred samples themselves: tr (A B)^1/2 is the sum of the singular values of X Y^T."""
    a, b = sample(0, 5, 30), sample(1, 9, 30, shift=0.5)
    x, y = (a - a.mean(axis=0)) / 2, (b - b.mean(axis=0)) / 8**0.5
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_shifted_and_scaled_gaussians_have_the_closed_form():
    rows = np.random.default_rng(0).normal(size=(500, 6))
    shift = np.arange(6.0)
    assert frechet_distance(rows, rows + shift) == pytest.approx((shift**2).sum(), rel=1e-9)
    # N(m, S) and N(3 m, 9 S): |2 m|^2 + tr(S + 9 S - 2 * 3 S)
    expected = (2 * rows.mean(axis=0)) @ (2 * rows.mean(axis=0)) + 4 * np.trace(np.cov(rows, rowvar=False))
    assert frechet_distance(rows, 3 * rows) == pytest.approx(expected, rel=1e-9)


def test_it_sees_correlations():
    a = np.random.default_rng(1).normal(size=(4000, 2))
    b = np.stack([a[:, 0], 0.6 * a[:, 0] + 0.8 * a[:, 1]], axis=1)  # same variances, correlation 0.6
    # tr(I + B - 2 B^1/2) with eigenvalues 1.6 and 0.4 of B
    assert frechet_distance(a, b) == pytest.approx(4 - 2 * (1.6**0.5 + 0.4**0.5), abs=0.02)


def test_constant_features_do_not_disturb_it():
    rows = np.random.default_rng(2).normal(size=(100, 5))
    padded = np.concatenate([rows, np.full((100, 3), -1.0)], axis=1)
    assert frechet_distance(padded, 2 * padded + 1) == pytest.approx(frechet_distance(rows, 2 * rows + 1), rel=1e-9)


def test_a_large_common_offset_costs_no_digits():
    a, b = sample(0, 100, 5), sample(1, 100, 5)
    # 2^20 is added without rounding to what is a multiple of 2^-24 first
    a, b = np.round(a * 2**24) / 2**24, np.round(b * 2**24) / 2**24
    assert frechet_distance(a + 2**20, b + 2**20) == pytest.approx(frechet_distance(a, b), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_tensors_and_arrays_of_any_dtype_count_in_float64(dtype):
    a, b = ((torch.from_numpy(sample(seed, 50, 4)) * 3).to(dtype) for seed in (0, 1))
    expected = frechet_distance(a.double().numpy(), b.double().numpy())
    assert frechet_distance(a, b.numpy()) == expected
    assert frechet_distance(a.float().requires_grad_() if dtype == torch.float32 else a, b) == expected


def test_read_only_and_reversed_arrays_are_taken():
    a, b = sample(0, 30, 4), sample(1, 20, 4)
    expected = frechet_distance(a, b)
    a.flags.writeable = False
    assert frechet_distance(a[::-1], b[::-1]) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_batches_give_the_mean_and_covariance_of_the_whole(sizes, seed):
    rows = sample(seed, sum(sizes) + 2, 5, shift=100)
    batches = np.split(rows, np.cumsum(sizes))
    streamed = FrechetStatistics()
    for batch in batches:
        streamed.update(batch)
    one, other = FrechetStatistics(), FrechetStatistics()
    for index, batch in enumerate(batches):
        (one, other)[index % 2].update(batch)
    for statistics in (streamed, one.merge(other), FrechetStatistics().merge(streamed)):
        assert statistics.count == len(rows)
        np.testing.assert_allclose(statistics.mean, rows.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(statistics.covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-9)


def test_a_merge_leaves_the_other_as_it_was():
    a, b = FrechetStatistics().update(sample(0, 9, 3)), FrechetStatistics().update(sample(1, 9, 3))
    merged = FrechetStatistics().merge(a).merge(b)
    before = a.mean
    merged.update(sample(2, 9, 3))
    assert torch.equal(a.mean, before)
    assert (a.count, b.count, merged.count) == (9, 9, 27)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_gives_the_same_statistics_and_more_can_be_added(tmp_path, suffix):
    a, b = sample(0, 30, 4), sample(1, 20, 4)
    FrechetStatistics().update(a).save(tmp_path / f"a{suffix}")
    loaded = FrechetStatistics.load(tmp_path / f"a{suffix}")
    assert loaded.count == 30
    assert loaded.distance(FrechetStatistics().update(b)) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    both = FrechetStatistics().update(np.concatenate([a, b]))
    np.testing.assert_allclose(loaded.update(b).covariance, both.covariance, rtol=1e-12)


def test_the_npz_of_other_fid_programs_is_read_but_not_added_to(tmp_path):
    a, b = sample(0, 30, 4), sample(1, 20, 4)
    np.savez(tmp_path / "a.npz", mu=a.mean(axis=0), sigma=np.cov(a, rowvar=False))
    loaded = FrechetStatistics.load(tmp_path / "a.npz")
    assert loaded.distance(FrechetStatistics().update(b)) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    for add in (lambda: loaded.update(b), lambda: FrechetStatistics().merge(loaded)):
        with pytest.raises(ValueError, match="number of samples"):
            add()
    loaded.save(tmp_path / "again.safetensors")
    assert FrechetStatistics.load(tmp_path / "again.safetensors").count is None


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), ValueError, "features_a, features_b: 3 and 4 features"),
        (np.zeros((5, 3)), np.zeros((1, 3)), ValueError, "features_b: 1 samples; needed 2 or more"),
        (np.zeros(5), np.zeros((5, 3)), ValueError, r"features_a: shape \(5,\); needed \(N, D\)"),
        (np.zeros((5, 0)), np.zeros((5, 0)), ValueError, r"features_a: shape \(5, 0\)"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), ValueError, "features_b: some values are not finite"),
        ([[1.0]], np.zeros((5, 3)), TypeError, "features_a: list; needed a torch tensor or a numpy array"),
        (np.zeros((5, 3), dtype=complex), np.zeros((5, 3)), TypeError, "complex128; needed real"),
    ],
)
def test_what_is_no_pair_of_feature_matrices_is_named(a, b, error, message):
    with pytest.raises(error, match=message):
        frechet_distance(a, b)


def test_misuse_of_statistics_is_named(tmp_path):
    statistics = FrechetStatistics().update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="1 samples so far; needed 2"):
        statistics.distance(statistics)
    with pytest.raises(ValueError, match="4 per sample; needed 3, as before"):
        statistics.update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="other: 4 features per sample; needed 3"):
        statistics.update(np.ones((1, 3))).distance(FrechetStatistics().update(np.zeros((2, 4))))
    with pytest.raises(ValueError, match=r"a\.txt: needed a file name that ends in \.npz or \.safetensors"):
        statistics.save(tmp_path / "a.txt")
    np.savez(tmp_path / "features.npz", features=np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"features\.npz: holds features; needed mu \(D,\)"):
        FrechetStatistics.load(tmp_path / "features.npz")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        statistics.save(tmp_path / "file" / "a.npz")
