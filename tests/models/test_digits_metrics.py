"""The figures of the digits models mean what they say."""

import pytest
import torch

from fastdistill.models.digits import metrics
from fastdistill.models.digits.data import load_digits


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_real_digits_score_perfectly(digits):
    scores = metrics.score(digits.images, digits.labels)
    assert scores.fd < 1e-6
    assert scores.accuracy > 0.998
    assert scores.diversity == pytest.approx(1, abs=1e-6)
    assert scores.diversity_per_digit == pytest.approx((1,) * 10, abs=1e-6)


def test_grey_and_rgb_count_the_same(digits):
    images = digits.images[:50]
    assert metrics.frechet(images) == pytest.approx(metrics.frechet(images.expand(-1, 3, -1, -1)), rel=1e-6)


def test_wrong_prompts_cost_accuracy_only(digits):
    wrong = (digits.labels + 1) % 10
    assert metrics.accuracy(digits.images, wrong) < 0.01
    assert metrics.frechet(digits.images) < 1e-6


def test_copies_of_one_image_have_no_diversity(digits):
    first = torch.cat([digits.images[digits.labels == digit][:1] for digit in range(10)])
    spread = metrics.diversity(first.repeat(3, 1, 1, 1), torch.arange(10).repeat(3))
    assert spread.tolist() == pytest.approx([0] * 10, abs=1e-9)


def test_diversity_halves_with_the_distances(digits):
    means = torch.stack([digits.images[digits.labels == digit].mean(0) for digit in range(10)])[digits.labels]
    spread = metrics.diversity(means + (digits.images - means) / 2, digits.labels)
    assert spread.tolist() == pytest.approx([0.5] * 10, abs=1e-5)


def test_noise_is_far_from_the_digits():
    noise = torch.rand(100, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert metrics.frechet(noise) > 10


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 2, 32, 32), r"\(2, 2, 32, 32\).*1 or 3"),
        (torch.zeros(2, 1, 8, 8), r"\(2, 1, 8, 8\)"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.full((2, 1, 32, 32), torch.nan), "not finite"),
        (torch.zeros(1, 1, 32, 32), "1 samples; needed 2 or more"),
    ],
)
def test_bad_images_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        metrics.frechet(images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(3), r"\(3,\); needed \(20,\)"),
        (torch.full((20,), 10), "0 to 9"),
        (torch.zeros(20), "integers"),
        (torch.zeros(20, dtype=torch.long), "0 images of digit 1"),
    ],
)
def test_bad_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.diversity(torch.zeros(20, 1, 32, 32), labels)
