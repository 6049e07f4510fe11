"""FID: the Frechet distance of the features of an Inception network that the user gives.

Heusel et al., arXiv 1706.08500.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ._features import Features
from ._images import Images, as_bytes
from .frechet import FrechetStatistics

Inception = str | Path | Callable[[Tensor], Features]
"""Weight file of torch-fidelity's Inception v3, or a function from (B, 3, H, W) uint8 to (B, D)."""


def fid(
    real: Images | Iterable[Images] | FrechetStatistics,
    fake: Images | Iterable[Images] | FrechetStatistics,
    inception: Inception,
    *,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> float:
    """Frechet Inception distance; 0 is best. It falls with the number of images: papers use 30000 or 50000 of each.

    Args:
        real, fake: images as for `inception_statistics`, or the statistics themselves, gathered or loaded before.
        inception, batch_size, device: as for `inception_statistics`.
    """
    if not (isinstance(real, FrechetStatistics) and isinstance(fake, FrechetStatistics)):
        inception = _network(inception, device)
    real, fake = (
        images
        if isinstance(images, FrechetStatistics)
        else inception_statistics(images, inception, batch_size=batch_size, device=device)
        for images in (real, fake)
    )
    return real.distance(fake)


@torch.no_grad()
def inception_statistics(
    images: Images | Iterable[Images],
    inception: Inception,
    *,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> FrechetStatistics:
    """Mean and covariance of the Inception features of `images`; `save` them once for a set that does not change.

    Args:
        images: tensor (N, 1 or 3, H, W) or array (N, H, W, 1 or 3), uint8 or floating in [0, 1], or a list of PIL
            images of one size; or any other iterable of such batches, for sets that do not fit into memory. Rounded to
            8 bits, as a saved picture is.
        inception: path of torch-fidelity's weights ("weights-inception-2015-12-05-….pth", the original network in
            PyTorch's form; nothing is downloaded), whose 2048 pooled features are used: the network of published FIDs,
            which resizes to 299 x 299 as TensorFlow did. Or any function from uint8 (B, 3, H, W) on `device` to
            features (B, D), such as another program's TorchScript Inception: the result is then no FID by name.
        batch_size: images at a time. device: where the network runs.

    Raises:
        ImportError: a path is given and torch-fidelity is not installed, or does not import.
        ValueError: the file is not such weights, images of another form. FileNotFoundError: no such file.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: needed 1 or more")
    features = inception_features(inception, device)
    statistics = FrechetStatistics()
    whole = isinstance(images, Tensor | np.ndarray | Image.Image | list | tuple)
    for batch in (images,) if whole else images:
        for part in as_bytes(batch).split(batch_size):
            statistics.update(features(part))
    return statistics


def inception_features(inception: Inception, device: str | torch.device = "cpu") -> Callable[[Images], Features]:
    """The function from images to their features (N, D) on `device` behind `inception_statistics`; same arguments."""
    network = _network(inception, device)
    return torch.no_grad()(lambda images: network(as_bytes(images).to(device)))


def _network(inception: Inception, device: str | torch.device) -> Callable[[Tensor], Features]:
    return _torch_fidelity(Path(inception), device) if isinstance(inception, str | Path) else inception


def _torch_fidelity(weights: Path, device: str | torch.device) -> Callable[[Tensor], Tensor]:
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:  # torchmetrics' Inception is torch-fidelity's, too
        raise ImportError(
            f"fid with a weight file needs torch-fidelity ({error}): pip install 'fastdistill[fid]', or give "
            "`inception` as a function from uint8 images (B, 3, H, W) to features (B, D)"
        ) from error
    if not weights.is_file():
        raise FileNotFoundError(f"inception: there is no file {weights}")
    try:
        # torch-fidelity unpickles the file without restrictions: whether it holds tensors alone is seen here first.
        torch.load(weights, map_location="cpu", weights_only=True)
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
        )
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        # torch's advice for a file that is more than tensors is to run the code in it.
        why = "no file of tensors" if isinstance(error, pickle.UnpicklingError | EOFError) else str(error)[:200]
        raise ValueError(f"inception: {weights} holds no weights of torch-fidelity's Inception: {why}") from error
    network = network.to(device).eval()
    return lambda images: network(images)[0]
