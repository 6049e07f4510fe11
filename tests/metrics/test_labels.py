"""The figures that know what was asked for: accuracy of a classifier, diversity within a class."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fastdistill.metrics import classifier_accuracy, diversity

IMAGES = torch.eye(4).repeat(3, 1)  # (12, 4): image i is of class i % 4
LABELS = torch.arange(12) % 4


def test_scores_and_classes_of_tensors_and_arrays_count_the_same():
    wrong = LABELS.clone()
    wrong[:3] = (wrong[:3] + 1) % 4
    classifiers = [
        torch.nn.Identity(),
        lambda images: images.argmax(dim=1).to(torch.uint8),
        lambda images: images.numpy(),
        KNeighborsClassifier(1).fit(IMAGES.numpy(), LABELS.numpy()).predict,
    ]
    for classifier in classifiers:
        assert classifier_accuracy(classifier, IMAGES, LABELS) == 1
        assert classifier_accuracy(classifier, IMAGES, wrong.numpy(), batch_size=5) == 0.75


def test_a_classifier_sees_batches_of_the_images_as_they_are_without_a_graph():
    seen = []

    def classifier(images):
        seen.append((images, torch.is_grad_enabled()))
        return np.zeros(len(images), dtype=int)

    images = np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3)
    classifier_accuracy(classifier, images, np.zeros(5, dtype=int), batch_size=2)
    assert [len(batch) for batch, _ in seen] == [2, 2, 1]
    assert not any(graph for _, graph in seen)
    np.testing.assert_array_equal(np.concatenate([batch for batch, _ in seen]), images)


@pytest.mark.parametrize(
    ("classifier", "images", "labels", "message"),
    [
        (torch.nn.Identity(), IMAGES[:0], LABELS[:0], "images: none"),
        (torch.nn.Identity(), IMAGES, LABELS[:3], r"labels: shape \(3,\); needed \(12,\)"),
        (torch.nn.Identity(), IMAGES, LABELS.float(), "labels: dtype torch.float32; needed integers"),
        (lambda images: images[:, 0], IMAGES, LABELS, r"returned \(12,\) torch.float32 for 12 images"),
        (lambda images: images[:1], IMAGES, LABELS, r"returned \(1, 4\)"),
        (lambda images: list(images), IMAGES, LABELS, "returned list"),
    ],
)
def test_what_gives_no_accuracy_is_named(classifier, images, labels, message):
    with pytest.raises(ValueError, match=message):
        classifier_accuracy(classifier, images, labels)


def test_diversity_is_the_ratio_of_the_mean_distances_of_each_class():
    generator = torch.Generator().manual_seed(0)
    real, labels = torch.randn(40, 5, generator=generator), torch.arange(40) % 2 + 7
    by_hand = [torch.pdist(real[labels == label].double()).mean() for label in (7, 8)]
    centres = torch.stack([real[labels == label].mean(0) for label in (7, 8)])[labels - 7]
    fake = centres + (real - centres) * torch.tensor([0.5, 2.0])[labels - 7][:, None]
    assert diversity(fake, labels, real.numpy(), labels.numpy()).tolist() == pytest.approx([0.5, 2], rel=1e-5)
    unit = torch.tensor([[0.0], [1.0]]).repeat(2, 1)  # distance 1 in both classes
    real_1d, two = torch.zeros(4, 5), torch.tensor([7, 7, 8, 8])
    real_1d[:, :1] = unit
    expected = [float(distance) for distance in by_hand]
    assert diversity(real, labels, real_1d, two).tolist() == pytest.approx(expected, rel=1e-12)


def test_copies_have_no_diversity_and_more_rows_than_a_chunk_change_nothing():
    real = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    labels = torch.zeros(3000, dtype=torch.int64)
    assert diversity(real[:1].expand(5, -1), labels[:5], real, labels).tolist() == [0]
    assert diversity(real, labels, real[:2], labels[:2]).item() == pytest.approx(
        float(torch.pdist(real).mean() / torch.pdist(real[:2]).mean()), rel=1e-12
    )


@pytest.mark.parametrize(
    ("fake_labels", "real_labels", "message"),
    [
        ([0, 0, 0, 1], [0, 0, 1, 1], "fake_labels: 1 samples of class 1"),
        ([0, 0, 1, 1], [0, 0, 0, 1], "real_labels: 1 samples of class 1"),
        ([0, 0, 1, 5], [0, 0, 1, 1], "fake_labels: class 5 is not among real_labels"),
        ([0, 0, 1], [0, 0, 1, 1], r"fake_labels: shape \(3,\); needed \(4,\)"),
    ],
)
def test_classes_without_a_pair_are_named(fake_labels, real_labels, message):
    with pytest.raises(ValueError, match=message):
        diversity(torch.randn(4, 2), np.array(fake_labels), torch.randn(4, 2), np.array(real_labels))


def test_real_samples_that_are_all_equal_are_named():
    labels = torch.tensor([3, 3])
    with pytest.raises(ValueError, match="real: all samples of class 3 are equal"):
        diversity(torch.randn(2, 4), labels, torch.ones(2, 4), labels)
