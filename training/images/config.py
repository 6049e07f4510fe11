"""Images by configuration: what to read, how to frame it, whether to keep the encodings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import require
from ..data import Data, PromptDropout
from ..digits import digits_images
from ..teacher import Teacher
from ..world import World
from .cache import DTYPES, CachedImageData, cache_images
from .data import ImageData
from .framing import CROPS, Framing
from .reading import Images
from .sources import HuggingFaceDataset, ImageFolder, Source, SourceError, TarFiles

KINDS = ("auto", "folder", "datasets", "webdataset", "digits")


@dataclass(frozen=True)
class ImagesConfig:
    """Real images with captions.

    Attributes:
        source: a folder; tar files, as "data/{000..099}.tar" or "data/*.tar"; a dataset's folder or name; "digits".
        kind: "folder", "datasets", "webdataset" or "digits"; "auto" looks at the source. The digits are held in
            memory, encoded: of what follows only `dropout` and `seed` concern them.
        split: of a dataset.
        image: column of the images in a dataset ("image"), extensions in tar files ("jpg;jpeg;png;webp"); None for
            these.
        caption: column of the captions in a dataset or in metadata.jsonl ("text"), extension in tar files ("txt", or
            "json.caption" for a value in a JSON member); None for these.
        resolution: in pixels, of a side, or with buckets of the square whose area they have; None for the teacher's.
        crop: "center", or "random", drawn each time. Images are resized to cover the size first, so that only what
            exceeds its shape is cut off.
        flip: mirror every other image. Off, since text and much else must not be mirrored.
        buckets: sort images into shapes near their own; a batch is of one shape.
        bucket_multiple: of which the sides of buckets are, in pixels.
        max_aspect: of a bucket, longer to shorter side.
        cache: folder for latents and text encodings, computed once; None encodes every batch anew.
        cache_dtype: "float32", "bfloat16" or "float16".
        pixels: whether batches from a cache hold the pixels too, which only losses on pixels need.
        dropout: share of samples whose prompt is left out, for guidance.
        max_unreadable: share of the images that may be unreadable before the run stops.
        workers: threads that decode; 0 for none.
        ahead: batches that are decoded before they are asked for.
        seed: of the order.
    """

    source: str | None = None
    kind: str = "auto"
    split: str = "train"
    image: str | None = None
    caption: str | None = None
    resolution: int | None = None
    crop: str = "center"
    flip: bool = False
    buckets: bool = False
    bucket_multiple: int = 64
    max_aspect: float = 4.0
    cache: str | None = None
    cache_dtype: str = "float32"
    pixels: bool = True
    dropout: float = 0.0
    max_unreadable: float = 0.05
    workers: int = 4
    ahead: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("crop", CROPS), ("cache_dtype", tuple(DTYPES))):
            require(name, getattr(self, name), getattr(self, name) in known, f"one of {', '.join(known)}")
        require("resolution", self.resolution, self.resolution is None or self.resolution >= 1, "1 or more")
        require("bucket_multiple", self.bucket_multiple, self.bucket_multiple >= 1, "1 or more")
        require("max_aspect", self.max_aspect, self.max_aspect >= 1, "1 or more")
        require("dropout", self.dropout, 0 <= self.dropout <= 1, "in [0, 1]")
        require("max_unreadable", self.max_unreadable, 0 <= self.max_unreadable < 1, "in [0, 1)")
        for name in ("workers", "ahead"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        if self.cache is not None and self.crop == "random":
            raise ValueError("crop must be center where images are cached, since one crop is kept of each; got random")


def open_images(config: ImagesConfig, teacher: Teacher, world: World | None = None) -> Data:
    """The batches of a configuration for a teacher, on its device; a cache that is not whole is completed first.

    world: the processes that share the run, each of which calls this.

    Raises:
        ValueError: no source, or a size that the teacher's autoencoder cannot halve often enough.
        SourceError: no images there, or captions or columns that are missing.
        ImportError: a library that reads them is not installed; the message says what to install.
        CacheError: the cache is of something else, or damaged.
        TooManyUnreadable: of the images whose headers are read, or which are encoded, at once.
    """
    kind = _kind(config)
    if kind == "digits":
        data: Data = digits_images(teacher, seed=config.seed)
    else:
        framing = framing_of(config, teacher)
        data = _data(config, framing, open_source(config), teacher, world)
    return PromptDropout(data, config.dropout, teacher.unconditional) if config.dropout else data


def open_source(config: ImagesConfig) -> Source:
    """The images that a configuration names, nothing decoded."""
    kind = _kind(config)
    columns = {name: value for name in ("image", "caption") if (value := getattr(config, name)) is not None}
    if kind == "folder":
        if config.image is not None:
            raise ValueError(f"image: a folder has no columns; got {config.image!r}")
        return ImageFolder(config.source, **columns)
    if kind == "datasets":
        return HuggingFaceDataset(config.source, config.split, **columns)
    if kind == "webdataset":
        return TarFiles(config.source, **columns)
    raise ValueError("source: the digits are held in memory, with several captions each; use digits_images")


def framing_of(config: ImagesConfig, teacher: Teacher) -> Framing:
    """How images are framed for a teacher."""
    factor = teacher.pipeline.vae_scale_factor
    height, width = (side * factor for side in teacher.sample_shape[1:])
    if config.resolution is not None:
        height = width = config.resolution
    for name, side in (("bucket_multiple", config.bucket_multiple),) if config.buckets else (("resolution", height),):
        require(name, side, side % factor == 0, f"a multiple of {factor}, by which the autoencoder divides it")
    return Framing(height, width, config.crop, config.flip, config.buckets, config.bucket_multiple, config.max_aspect)


def _data(config: ImagesConfig, framing: Framing, source: Source, teacher: Teacher, world: World | None) -> Data:
    options = {"max_unreadable": config.max_unreadable, "workers": config.workers}
    if config.cache is None:
        return ImageData(Images(source, framing, **options), teacher, seed=config.seed, ahead=config.ahead)
    cache = cache_images(source, framing, teacher, config.cache, dtype=config.cache_dtype, world=world, **options)
    return CachedImageData(cache, seed=config.seed, pixels=config.pixels, ahead=config.ahead)


def _kind(config: ImagesConfig) -> str:
    if config.source is None:
        raise ValueError("source must be a folder, tar files, a dataset, or digits; got None")
    if config.kind != "auto":
        return config.kind
    path = Path(config.source)
    if config.source == "digits":
        return "digits"
    if path.suffix == ".tar" or "::" in config.source:
        return "webdataset"
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "datasets"
    if path.is_dir():
        return "webdataset" if any(path.glob("*.tar")) else "folder"
    raise SourceError(f"{config.source}: no such folder; to open a dataset by its name, set kind to datasets")
