"""The Frechet distance between Gaussians fitted to two sets of features, at once or gathered batch by batch.

Heusel et al., arXiv 1706.08500: `|m_a - m_b|^2 + tr(A + B - 2 (A B)^1/2)`. With Inception features it is called FID.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdistill._output import write_files

from ._features import Features, as_features, as_pair

_FORMATS = (".npz", ".safetensors")


def frechet_distance(features_a: Features, features_b: Features) -> float:
    """Frechet distance of `features_a` (N, D) and `features_b` (M, D), in squared units of the features; 0 is best.

    Float64 whatever the input's dtype, on the device of `features_a`. Covariances may be singular: N < D works, but
    the distance depends on the number of samples (fewer: larger), so compare equal numbers only.

    Args:
        features_a, features_b: tensors or arrays, two rows or more.

    Raises:
        TypeError, ValueError: not feature matrices of one width, fewer than two rows, values that are not finite.
    """
    a, b = as_pair(("features_a", "features_b"), features_a, features_b, at_least=2)
    return FrechetStatistics().update(a).distance(FrechetStatistics().update(b))


class FrechetStatistics:
    """Mean and covariance of features that come in batches, of any feature function.

        real = FrechetStatistics()
        for batch in loader:
            real.update(network(batch))  # (N, D)
        real.save("real.npz")
        distance = FrechetStatistics.load("real.npz").distance(fake)

    Sums are float64, on the device of the first batch, and centred (Chan, Golub and LeVeque 1979), so a large mean
    costs no digits. The order of batches matters only to rounding.
    """

    def __init__(self) -> None:
        self.count: int | None = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None  # (D, D) sum of centred outer products

    def update(self, features: Features) -> FrechetStatistics:
        """Add the rows of `features` (N, D), N >= 0; returns itself."""
        rows = as_features("features", features, at_least=0)
        if len(rows):
            mean = rows.mean(dim=0)
            centred = rows - mean
            self._add(len(rows), mean, centred.T @ centred)
        return self

    def merge(self, other: FrechetStatistics) -> FrechetStatistics:
        """Add all samples of `other`, gathered by another process or read from a file; returns itself."""
        if other.count is None:
            raise ValueError("other: its number of samples is unknown, so it has no weight in a merge")
        if other.count:
            self._add(other.count, other._mean, other._scatter)
        return self

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        self._need(1)
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased (divided by the number of samples less one)."""
        self._need(2)
        return self._scatter if self.count is None else self._scatter / (self.count - 1)

    def distance(self, other: FrechetStatistics) -> float:
        """Frechet distance to `other`, of the same number of features.

        `tr (A B)^1/2` is the sum of the singular values of `F_a^T F_b` with `A = F_a F_a^T` from A's eigenvectors: no
        root of a product is taken, so eigenvalues of 0 stay 0 and do not come back as the root of a rounding error.
        """
        mean_a, mean_b = self.mean, other.mean.to(self.mean.device)
        if mean_a.shape != mean_b.shape:
            raise ValueError(f"other: {len(mean_b)} features per sample; needed {len(mean_a)}")
        cov_a, cov_b = self.covariance, other.covariance.to(mean_a.device)
        cross = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
        total = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
        return max(float(total), 0.0)

    def save(self, path: str | Path) -> None:
        """Write `mu` (D,), `sigma` (D, D) and `count` to a .npz (which other FID programs read) or .safetensors file.

        Raises:
            ValueError: another suffix, or fewer than two samples. OutputError: the file cannot be written.
        """
        path = _checked(path)
        arrays = {"mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().contiguous().numpy()}
        if self.count is not None:
            arrays["count"] = np.array(self.count, dtype=np.int64)
        if path.suffix == ".npz":
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            content = buffer.getvalue()
        else:
            from safetensors.numpy import save

            content = save(arrays)
        write_files({path: content})

    @classmethod
    def load(cls, path: str | Path) -> FrechetStatistics:
        """Read what `save` wrote, or another program's .npz with `mu` and `sigma` alone (`count` is then None: good
        for distances, not for `update` and `merge`).

        Raises:
            ValueError: another suffix, or no such arrays in the file. OSError: the file cannot be read.
        """
        path = _checked(path)
        if path.suffix == ".npz":
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
        else:
            from safetensors.numpy import load_file

            arrays = load_file(path)
        if not {"mu", "sigma"} <= arrays.keys():
            raise ValueError(f"{path}: holds {', '.join(arrays) or 'nothing'}; needed mu (D,) and sigma (D, D)")
        mu, sigma = (torch.from_numpy(np.asarray(arrays[name], dtype=np.float64)) for name in ("mu", "sigma"))
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"{path}: mu {tuple(mu.shape)}, sigma {tuple(sigma.shape)}; needed (D,) and (D, D)")
        if not bool(mu.isfinite().all() and sigma.isfinite().all()):
            raise ValueError(f"{path}: some values are not finite")
        statistics = cls()
        statistics.count = int(arrays["count"]) if "count" in arrays else None
        if statistics.count is not None and statistics.count < 2:
            raise ValueError(f"{path}: count {statistics.count}; needed 2 or more")
        statistics._mean = mu
        statistics._scatter = sigma if statistics.count is None else sigma * (statistics.count - 1)
        return statistics

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.count is None:
            raise ValueError("the number of samples behind these statistics is unknown, so nothing can be added")
        if self._mean is None:
            self.count, self._mean, self._scatter = count, mean.clone(), scatter.clone()
            return
        if mean.shape != self._mean.shape:
            raise ValueError(f"features: {len(mean)} per sample; needed {len(self._mean)}, as before")
        shift = mean.to(self._mean.device) - self._mean
        total = self.count + count
        self._scatter += scatter.to(shift.device) + torch.outer(shift, shift) * (self.count * count / total)
        self._mean += shift * (count / total)
        self.count = total

    def _need(self, samples: int) -> None:
        if self.count is not None and self.count < samples:
            raise ValueError(f"{self.count} samples so far; needed {samples} or more")


def _factor(covariance: Tensor) -> Tensor:
    """(D, R) F with F F^T = `covariance`, R its rank to rounding."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    rounding = torch.finfo(torch.float64).eps * len(values) * values.abs().max()
    kept = values > rounding
    return vectors[:, kept] * values[kept].sqrt()


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise ValueError(f"{path}: needed a file name that ends in {' or '.join(_FORMATS)}")
    return path
