"""Two sets on disk against each other: what `fastdistill metrics A B` prints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ._features import as_features
from .frechet import frechet_distance
from .neighbours import precision_recall
from .wasserstein import sliced_wasserstein

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def compare(real: Path, fake: Path, size: int = 8, k: int = 3) -> dict[str, float | int]:
    """Numbers of samples and features, Frechet distance, precision, recall and sliced Wasserstein distance.

    Args:
        real, fake: as for `read_features`, both of one kind.
        size: of pictures. k: neighbours of precision and recall.

    Raises:
        ValueError, OSError: as `read_features`, or two sets that cannot be compared.
    """
    a, b = read_features(real, size), read_features(fake, size)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{real}: {a.shape[1]} features per sample, {fake}: {b.shape[1]}; needed the same")
    for path, features in ((real, a), (fake, b)):
        if len(features) <= k:
            raise ValueError(f"{path}: {len(features)} samples; needed {k + 1} or more")
    precision, recall = precision_recall(a, b, k)
    return {
        "real": len(a),
        "fake": len(b),
        "features": a.shape[1],
        "frechet_distance": frechet_distance(a, b),
        "precision": precision,
        "recall": recall,
        "sliced_wasserstein": sliced_wasserstein(a, b),
    }


def read_features(path: Path, size: int = 8) -> Tensor:
    """(N, D) float64: the features in a .npy or .npz file, or the pixels of the pictures in a folder.

    Args:
        path: a .npy file, a .npz file with one array or one named "features", of shape (N, D); or a folder, whose
            pictures (not those of folders in it) are made RGB, area-averaged to `size` x `size`, in [-1, 1].
        size: pixels along each side.

    Raises:
        ValueError: no such arrays, no pictures, one that cannot be read, `size` below 1. FileNotFoundError: nothing
            there.
    """
    if size < 1:
        raise ValueError(f"size={size}: needed 1 or more")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        if not files:
            raise ValueError(f"{path}: no pictures in this folder ({', '.join(PICTURES)})")
        return torch.stack([_pixels(file, size) for file in files])
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"{path}: needed a folder of pictures, or features (N, D) in a .npy or .npz file")
    return as_features(str(path), _array(path))


def picture_features(picture: Image.Image, size: int) -> Tensor:
    """(D,) float64: what `read_features` reads of one picture."""
    small = picture.convert("RGB").resize((size, size), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, dtype=np.float64)).flatten() / 127.5 - 1


def _array(path: Path) -> np.ndarray:
    try:
        content = np.load(path)
        if isinstance(content, np.ndarray):
            return content
        with content:
            names = content.files
            if "features" not in names and len(names) != 1:
                raise ValueError(f"holds {', '.join(names) or 'nothing'}; needed one array, or one named features")
            return content["features" if "features" in names else names[0]]
    except (ValueError, EOFError, OSError) as error:  # damaged, or pickled objects
        raise ValueError(f"{path}: {error}") from error


def _pixels(file: Path, size: int) -> Tensor:
    try:
        with Image.open(file) as picture:
            return picture_features(picture, size)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{file}: not a picture that can be read: {error}") from error
