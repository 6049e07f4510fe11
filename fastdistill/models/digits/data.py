"""The real digits as 32x32 images whose 4x4 block means are the original 8x8 values.

Source: UCI "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, 1998, CC BY 4.0, the 1797 images
that scikit-learn carries (nothing is downloaded).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

BLOCK = 4  # pixels of a 32x32 image per original pixel, along each side
ROUNDS = 60  # of the back-projection; the bisection below closes what is left


class Digits(NamedTuple):
    """Images `(n, 1, 32, 32)` float32 in [-1, 1] (-1 paper, 1 ink) and labels `(n,)` int64, 0 to 9."""

    images: torch.Tensor
    labels: torch.Tensor


def load_originals() -> Digits:
    """The 1797 digits as they are published: images `(1797, 1, 8, 8)` float32 in [-1, 1], labels `(1797,)` int64.

    Raises:
        ImportError: scikit-learn, which carries the data, is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load_uci_digits
    except ImportError as error:
        raise ImportError('the digits data needs scikit-learn: pip install "fastdistill[demo]"') from error
    data = load_uci_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1  # 0..16 ink counts
    return Digits(images, torch.from_numpy(data.target).long())


@lru_cache(maxsize=1)
def _enlarged() -> Digits:
    images, labels = load_originals()
    return Digits(enlarge(images), labels)


def load_digits() -> Digits:
    """The 1797 digits as images `(1797, 1, 32, 32)` float32 in [-1, 1], labels `(1797,)` int64.

    Their 4x4 block means are the published 8x8 values, so a metric at 8x8 sees the data itself. The enlargement takes
    a second and is kept for the process; what is returned is a copy that the caller may change.

    Raises:
        ImportError: scikit-learn, which carries the data, is not installed.
    """
    images, labels = _enlarged()
    return Digits(images.clone(), labels.clone())


def enlarge(originals: torch.Tensor) -> torch.Tensor:
    """Smooth images four times larger whose 4x4 block means equal `originals`.

    Plain bicubic enlargement changes the block means, which costs a Frechet distance of 0.9 that no generator could
    win back. Back-projection keeps it smooth; the clamp to [-1, 1] leaves an error that a shift per block removes.

    Args:
        originals: `(n, 1, h, w)`, floating, in [-1, 1].

    Returns:
        `(n, 1, 4h, 4w)` in [-1, 1], same dtype.

    Raises:
        ValueError: the shape is not four-dimensional or a value lies outside [-1, 1].
    """
    if originals.dim() != 4:
        raise ValueError(f"originals: shape {tuple(originals.shape)}; needed (n, 1, h, w)")
    if not bool((originals.abs() <= 1).all()):
        raise ValueError("originals: values outside [-1, 1] or not finite; needed in [-1, 1]")

    def up(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=BLOCK, mode="bicubic", align_corners=False)

    images = up(originals).clamp(-1, 1)
    for _ in range(ROUNDS):
        images = (images + up(originals - F.avg_pool2d(images, BLOCK))).clamp(-1, 1)
    return _shift_blocks(images, originals)


def _shift_blocks(images: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Add to each block the constant that, after the clamp, gives it the wanted mean (bisection: it is monotone)."""
    low, high = torch.full_like(means, -2), torch.full_like(means, 2)
    for _ in range(30):  # an interval of 4 halved 30 times: below float32 resolution
        middle = (low + high) / 2
        shifted = (images + F.interpolate(middle, scale_factor=BLOCK)).clamp(-1, 1)
        too_bright = F.avg_pool2d(shifted, BLOCK) > means
        low, high = torch.where(too_bright, low, middle), torch.where(too_bright, middle, high)
    return (images + F.interpolate((low + high) / 2, scale_factor=BLOCK)).clamp(-1, 1)
