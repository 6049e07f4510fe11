"""How good generated digits are: Frechet distance, accuracy and diversity, always at the 8x8 scale of the real data.

Everything here takes images `(n, 1 or 3, 32, 32)` floating in [-1, 1]; what lies outside is clamped, as saving a
picture does. Three channels are averaged to grey.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from fastdistill import metrics

from .data import load_originals

CLASSES = 10


@dataclass(frozen=True)
class DigitScores:
    """All figures of one set of images; the tuples run over the digits 0 to 9.

    `fd` is the Frechet distance to all 1797 real digits (0: indistinguishable), `accuracy` the share recognised as
    the digit that was asked for, `diversity` the mean pairwise distance within a digit over that of real ones.
    """

    fd: float
    accuracy: float
    diversity: float
    accuracy_per_digit: tuple[float, ...]
    diversity_per_digit: tuple[float, ...]


def score(images: torch.Tensor, labels: torch.Tensor) -> DigitScores:
    """Every figure at once for `images` `(n, 1|3, 32, 32)` of the wanted `labels` `(n,)`, two or more per digit.

    Raises:
        ValueError: bad shapes, labels outside 0 to 9, or fewer than two images of a digit.
        ImportError: scikit-learn is not installed.
    """
    return score_pixels(to_pixels(images), labels)


def score_pixels(pixels: np.ndarray, labels: torch.Tensor) -> DigitScores:
    """`score` of what `to_pixels` has made of the images, be it in parts and by several processes."""
    hits = _recognise(pixels) == _check_labels(labels, len(pixels))
    per_digit = tuple(float(hits[labels == digit].float().mean()) for digit in range(CLASSES))
    spread = _diversity(pixels, labels)
    distance = metrics.frechet_distance(pixels, _real_pixels()[0])
    return DigitScores(distance, float(hits.float().mean()), float(spread.mean()), per_digit, tuple(spread.tolist()))


def frechet(images: torch.Tensor) -> float:
    """Frechet distance between the 64 pixel values of `images` at 8x8 and those of all 1797 real digits.

    It depends on the number of images (fewer: larger); the project's figures use 1000, 100 per digit.
    """
    return metrics.frechet_distance(to_pixels(images), _real_pixels()[0])


def accuracy(images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of `images` that a classifier fitted on the real digits recognises as their `labels` `(n,)`."""
    return metrics.classifier_accuracy(recognise, images, _check_labels(labels, len(images)))


def recognise(images: torch.Tensor) -> torch.Tensor:
    """The digit `(n,)` int64 that `SVC(gamma=0.05)`, fitted once per process on the real digits, sees in each image."""
    return _recognise(to_pixels(images))


def diversity(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per digit `(10,)` float64: mean pairwise distance of its images over that of the real ones (real data: 1)."""
    return _diversity(to_pixels(images), labels)


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Grey 8x8 pixel values `(n, 64)` float64 in [-1, 1]: channel mean and area average of `images`."""
    if images.dim() != 4 or images.shape[1] not in (1, 3) or images.shape[2:] != (32, 32):
        raise ValueError(f"images: shape {tuple(images.shape)}; needed (n, 1 or 3, 32, 32)")
    if not images.is_floating_point():
        raise ValueError(f"images: dtype {images.dtype}; needed floating point in [-1, 1]")
    grey = images.detach().cpu().double().clamp(-1, 1).mean(dim=1, keepdim=True)
    if not bool(grey.isfinite().all()):
        raise ValueError("images: some values are not finite")
    return F.avg_pool2d(grey, 4).flatten(1).numpy()


def _recognise(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(_classifier().predict(pixels)).long()


def _diversity(pixels: np.ndarray, labels: torch.Tensor) -> torch.Tensor:
    counts = torch.bincount(_check_labels(labels, len(pixels)), minlength=CLASSES).tolist()
    for digit, count in enumerate(counts):
        if count < 2:
            raise ValueError(f"labels: {count} images of digit {digit}; diversity needs at least 2 of each")
    return metrics.diversity(pixels, labels, *_real_pixels())


def _check_labels(labels: torch.Tensor, count: int) -> torch.Tensor:
    if labels.shape != (count,):
        raise ValueError(f"labels: shape {tuple(labels.shape)}; needed ({count},), one per image")
    if labels.is_floating_point() or not bool(((labels >= 0) & (labels < CLASSES)).all()):
        raise ValueError("labels: needed integers from 0 to 9")
    return labels


@lru_cache(maxsize=1)
def _real_pixels() -> tuple[np.ndarray, np.ndarray]:
    originals, labels = load_originals()
    return originals.double().flatten(1).numpy(), labels.numpy()


@lru_cache(maxsize=1)
def _classifier():
    from sklearn.svm import SVC

    pixels, labels = _real_pixels()
    return SVC(gamma=0.05).fit(pixels, labels)
