"""How good a student is while it learns: figures of images that are made of the same noise every time.

The first figure of each kind is the one that decides which student is the best; lower is better.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from fastdistill.metrics import FrechetStatistics, inception_features, sliced_wasserstein
from fastdistill.metrics._features import as_tensor
from fastdistill.metrics.compare import PICTURES, picture_features, read_features

from .config import require
from .method import Method
from .sampling import sample_batches, sampler_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .teacher import Teacher

KINDS = ("none", "digits", "reference")
Features = Callable[[Tensor], Tensor | np.ndarray]
"""From images (B, 3, H, W) float32 in [-1, 1] on the teacher's device to features (B, D)."""
Measure = tuple[Callable[[Tensor], Tensor], Callable[[Sequence[Tensor]], dict[str, float]]]
"""From images (B, 3, H, W) to features (B, D) float64 on the CPU; from those of all batches, in order, to figures."""


@dataclass(frozen=True)
class ValidationConfig:
    """What a validation measures; how often is `TrainerConfig.validate_every`.

    Attributes:
        kind: "digits" for the figures of the digits (`docs/digits.md`), "reference" for the distance to real images, or
            "none".
        count: images that are made each time. Figures of different counts cannot be compared.
        seed: of their noise.
        batch_size: images made at once.
        reference: for kind "reference": a folder of pictures, or the statistics of their features
            (`FrechetStatistics.save`: .npz or .safetensors).
        features: for kind "reference": "package.module:function", a function from images (B, 3, H, W) in [-1, 1] to
            features (B, D), gives the Frechet distance "fd"; a .pth file, torch-fidelity's Inception weights, gives
            "fid". Without it the figure is the sliced Wasserstein distance of the pixels.
        size: pixels along each side of the images for the sliced Wasserstein distance.
    """

    kind: str = "none"
    count: int = 1000
    seed: int = 0
    batch_size: int = 50
    reference: str | None = None
    features: str | None = None
    size: int = 8

    def __post_init__(self) -> None:
        require("kind", self.kind, self.kind in KINDS, f"one of {', '.join(KINDS)}")
        for name, least in (("count", 2), ("batch_size", 1), ("size", 1)):
            require(name, getattr(self, name), getattr(self, name) >= least, f"{least} or more")
        if self.kind == "digits":
            require("count", self.count, self.count % 10 == 0 and self.count >= 20, "a multiple of 10, 20 or more")
        if self.kind == "reference" and self.reference is None:
            raise ValueError("reference must be a folder of pictures or a file of statistics; got None")


class Validator:
    """Figures of a student: `validator(student, method)`, for `distill(…, validate=validator)`.

    Torch's global random numbers are not touched, and image i has the same noise every time.

    Args:
        config: what to measure.
        teacher: whose pipeline decodes and encodes; a loaded pipeline does too.
        prompts: what images are made of, evenly spread over them; kind "digits" has its own.
        features: in place of `config.features`.

    Raises:
        ValueError, OSError: kind "none", no prompts, a reference or features that cannot be read.
        ImportError: scikit-learn (the digits) or torch-fidelity (Inception) is not installed.
    """

    def __init__(
        self,
        config: ValidationConfig,
        teacher: Teacher | DiffusionPipeline,
        prompts: Sequence[str],
        *,
        features: Features | None = None,
    ) -> None:
        require("kind", config.kind, config.kind != "none", "digits or reference, for there to be a validation")
        self.config, self.teacher = config, getattr(teacher, "pipeline", teacher)
        self.prompts = prompts_of(config, prompts)
        self._features, self._figures = measure(config, self.teacher, features)

    def __call__(self, student: nn.Module, method: Method) -> dict[str, float]:
        """Figures of the student, sampled as `method` says, in as many steps. It is in evaluation mode."""
        pipeline = sampler_of(self.teacher, student, method.scheduler(self.teacher.scheduler))
        config, sampling = self.config, method.sampling()
        batches = sample_batches(
            pipeline,
            self.prompts,
            steps=sampling["steps"],
            guidance_scale=sampling.get("guidance_scale", 1.0),
            seed=config.seed,
            batch_size=config.batch_size,
        )
        return self._figures([self._features(images) for _, images in batches])


def digits_validation(
    pipeline: DiffusionPipeline,
    steps: int = 1,
    *,
    guidance_scale: float = 1.0,
    seed: int = 0,
    count: int = 1000,
    batch_size: int = 250,
) -> dict[str, float]:
    """`fd`, `accuracy` and `diversity` of `count` images, as many of each digit, as in `docs/digits.md`.

    Args:
        pipeline: a student of the digits with its scheduler.
        steps, guidance_scale: how it is sampled.
        seed: of the noise; torch's global generator is not touched.
        count: a multiple of 10, 20 or more.
        batch_size: images made at once.
    """
    config = ValidationConfig("digits", count=count, seed=seed, batch_size=batch_size)
    options = {"steps": steps, "guidance_scale": guidance_scale, "seed": seed, "batch_size": batch_size}
    batches = sample_batches(pipeline, prompts_of(config, ()), **options)
    return _digits_figures([_digits_features(images) for _, images in batches])


def prompts_of(config: ValidationConfig, prompts: Sequence[str]) -> list[str]:
    """One for each image: evenly spread over `prompts`; kind "digits" has its own, as many of each digit."""
    if config.kind == "digits":
        from fastdistill.models.digits.sampling import balanced_labels
        from fastdistill.models.digits.text import prompt

        return [prompt(int(label)) for label in balanced_labels(config.count // 10)]
    if not prompts:
        raise ValueError("prompts: none; needed 1 or more to make images of")
    return [prompts[index * len(prompts) // config.count] for index in range(config.count)]


def measure(config: ValidationConfig, pipeline: DiffusionPipeline, features: Features | None = None) -> Measure:
    """The two halves of a measurement: features of a batch, and figures of the features of all batches.

    The features of different batches may be taken by different processes.

    Args:
        config: what to measure.
        pipeline: whose images are measured; it gives their size and the device.
        features: in place of `config.features`.

    Raises:
        ValueError, OSError, ImportError: as `Validator`.
    """
    of_batch = features_of(config, pipeline, features)
    if config.kind == "digits":
        from fastdistill.models.digits.data import load_originals

        load_originals()
        return of_batch, _digits_figures
    path = Path(config.reference)
    name = _figure(config, features)
    if name == "sliced_wasserstein":
        pixels = read_features(path, config.size)
        return of_batch, lambda batches: {name: sliced_wasserstein(pixels, torch.cat(list(batches)))}
    if path.is_file():
        real = FrechetStatistics.load(path)
    else:
        height, width = _sides(pipeline.unet.config.sample_size, pipeline.vae_scale_factor)
        real = _statistics(of_batch(batch) for batch in _pictures(path, (width, height), config.batch_size))
    return of_batch, lambda batches: {name: _statistics(batches).distance(real)}


def features_of(
    config: ValidationConfig, pipeline: DiffusionPipeline, features: Features | None = None
) -> Callable[[Tensor], Tensor]:
    """The first half of `measure`, which needs no reference: from images (B, 3, H, W) in [-1, 1] to (B, D) float64."""
    device = pipeline.unet.device
    if config.kind == "digits":
        return _digits_features
    if features is not None or _figure(config, features) == "fd":
        given = _imported(config.features) if features is None else features
        return torch.no_grad()(lambda images: as_tensor(given(images.to(device))).double().cpu())
    if config.features is None:
        return lambda images: _small(images, config.size)
    inception = inception_features(config.features, device)
    return lambda images: as_tensor(inception((images.clamp(-1, 1) + 1) / 2)).double().cpu()


def _figure(config: ValidationConfig, features: Features | None) -> str:
    """Name of the figure of kind "reference"."""
    if features is None and config.features is None:
        return "sliced_wasserstein"
    return "fid" if features is None and config.features.endswith(".pth") else "fd"


def _statistics(batches: Iterable[Tensor]) -> FrechetStatistics:
    gathered = FrechetStatistics()
    for batch in batches:
        gathered.update(batch)
    return gathered


def _digits_features(images: Tensor) -> Tensor:
    from fastdistill.models.digits.metrics import to_pixels

    return torch.from_numpy(to_pixels(images))


def _digits_figures(batches: Sequence[Tensor]) -> dict[str, float]:
    from fastdistill.models.digits.metrics import score_pixels
    from fastdistill.models.digits.sampling import balanced_labels

    pixels = torch.cat(list(batches)).numpy()
    scores = score_pixels(pixels, balanced_labels(len(pixels) // 10))
    return {"fd": scores.fd, "accuracy": scores.accuracy, "diversity": scores.diversity}


def _small(images: Tensor, size: int) -> Tensor:
    """(N, D) the features that `read_features` would read of these images once saved."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return torch.stack([picture_features(Image.fromarray(each), size) for each in pixels])


def _pictures(folder: Path, size: tuple[int, int], batch_size: int):
    """Batches (B, 3, H, W) in [-1, 1] of a folder's pictures, cut to the student's shape about their middle."""
    if not folder.is_dir():
        raise FileNotFoundError(f"reference: there is no file or folder {folder}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if len(files) < 2:
        raise ValueError(f"reference: {len(files)} pictures in {folder}; needed 2 or more ({', '.join(PICTURES)})")
    for first in range(0, len(files), batch_size):
        yield torch.stack([_picture(file, size) for file in files[first : first + batch_size]])


def _picture(file: Path, size: tuple[int, int]) -> Tensor:
    try:
        with Image.open(file) as picture:
            fitted = ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"reference: {file} cannot be read: {error}") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def _imported(name: str) -> Features:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"features: {name!r} cannot be imported ({error}); needed package.module:function") from error
    if not callable(found):
        raise ValueError(f"features: {name!r} is {type(found).__name__}; needed a function")
    return found


def _sides(sample_size: int | Sequence[int], factor: int) -> tuple[int, int]:
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return height * factor, width * factor
