"""Whether a classifier sees in each image what was asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ._features import Features, as_labels, as_tensor


@torch.no_grad()
def classifier_accuracy(
    classifier: Callable[[Features], Features], images: Features, labels: Features, *, batch_size: int = 256
) -> float:
    """Share of `images` that `classifier` gives their label, in [0, 1].

    Args:
        classifier: called with up to `batch_size` images at a time, as they are: it returns scores (n, classes), the
            largest of which counts, or classes (n,), integers. A network belongs in eval mode first. scikit-learn's
            `predict` serves, with arrays (N, D).
        images: (N, ...), tensor or array, in whatever range the classifier was trained on.
        labels: (N,) integers, the wanted classes.

    Raises:
        ValueError: no images, labels that do not fit, `batch_size` below 1, or a classifier that returns neither.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: needed 1 or more")
    if not len(images):
        raise ValueError("images: none; needed 1 or more")
    labels = as_labels("labels", labels, len(images))
    hits = 0
    for start in range(0, len(images), batch_size):
        wanted = labels[start : start + batch_size]
        hits += int((_classes(classifier(images[start : start + batch_size]), len(wanted)) == wanted).sum())
    return hits / len(images)


def _classes(answer: Features, count: int) -> torch.Tensor:
    if not isinstance(answer, torch.Tensor | np.ndarray):
        raise ValueError(f"classifier: it returned {type(answer).__name__}; needed a tensor or an array")
    answer = as_tensor(answer)
    if answer.ndim == 2 and len(answer) == count and answer.shape[1]:
        return answer.argmax(dim=1).cpu()
    if answer.shape == (count,) and not answer.is_floating_point():
        return answer.cpu()
    raise ValueError(
        f"classifier: it returned {tuple(answer.shape)} {answer.dtype} for {count} images; needed scores "
        f"({count}, classes) or integers ({count},)"
    )
