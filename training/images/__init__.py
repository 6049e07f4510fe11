"""Real images with captions as training data."""

from .cache import CachedImageData, CacheError, ImageCache, cache_images
from .config import ImagesConfig, open_images, open_source
from .data import ImageData
from .framing import Framing
from .plan import Plan
from .reading import Images, TooManyUnreadable, UnreadableImage
from .sources import HuggingFaceDataset, ImageFolder, Source, SourceError, TarFiles

__all__ = [
    "CacheError",
    "CachedImageData",
    "Framing",
    "HuggingFaceDataset",
    "ImageCache",
    "ImageData",
    "ImageFolder",
    "Images",
    "ImagesConfig",
    "Plan",
    "Source",
    "SourceError",
    "TarFiles",
    "TooManyUnreadable",
    "UnreadableImage",
    "cache_images",
    "open_images",
    "open_source",
]
