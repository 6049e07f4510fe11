"""From an image of any size to the size that a batch has: upright, resized to cover it, cropped, flipped."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..config import require

CROPS = ("center", "random")
_ORIENTATION = 0x0112  # EXIF; 5 to 8 lie on their side
Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class Framing:
    """How images become equally large.

    Attributes:
        height, width: in pixels; with buckets the area of a bucket is at most theirs.
        crop: "center" or "random".
        flip: whether every other image is mirrored.
        buckets: whether images are sorted into shapes near their own.
        multiple: of which the sides of buckets are, in pixels.
        max_aspect: of a bucket's longer side to its shorter one.
    """

    height: int
    width: int
    crop: str = "center"
    flip: bool = False
    buckets: bool = False
    multiple: int = 64
    max_aspect: float = 4.0

    def __post_init__(self) -> None:
        for name in ("height", "width", "multiple"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        require("crop", self.crop, self.crop in CROPS, f"one of {', '.join(CROPS)}")
        require("max_aspect", self.max_aspect, self.max_aspect >= 1, "1 or more")
        if not self.sizes:
            of = f"{self.height}x{self.width} pixels"
            raise ValueError(f"multiple {self.multiple}, max_aspect {self.max_aspect}: no bucket of {of}")

    @cached_property
    def sizes(self) -> list[Size]:
        """Of all buckets, by their shape: for each side the longest other one that the area allows."""
        if not self.buckets:
            return [(self.height, self.width)]
        area, step = self.height * self.width, self.multiple
        found = set()
        for side in range(step, area // step + 1, step):
            other = area // side // step * step
            if 0 < max(side, other) <= self.max_aspect * min(side, other):
                found |= {(side, other), (other, side)}
        return sorted(found, key=_log_aspect)

    def bucket(self, size: Size) -> int:
        """The number of the bucket whose shape is nearest to that of an image, in the logarithm of width to height."""
        wanted = _log_aspect(size)
        sizes = self.sizes
        return min(range(len(sizes)), key=lambda index: abs(_log_aspect(sizes[index]) - wanted))


@dataclass(frozen=True)
class Cover:
    """An image resized so that it just covers a size.

    Attributes:
        pixels: (H, W, 3) uint8, at least as large as `size`.
        original: its size before.
        size: to be cropped to.
    """

    pixels: Tensor
    original: Size
    size: Size

    def view(self, place: tuple[float, float] | None, flip: bool) -> tuple[Tensor, Tensor]:
        """The image (3, h, w) float32 in [-1, 1], and SDXL's sizes (6,) (arXiv 2307.01952, section 2.2).

        place: of the crop, down and to the right, each in [0, 1); None for the centre.
        flip: mirror it, before it is cropped.
        """
        height, width = self.size
        pixels = self.pixels.flip(1) if flip else self.pixels
        slack = pixels.shape[0] - height, pixels.shape[1] - width
        top, left = (s // 2 for s in slack) if place is None else (int(p * (s + 1)) for p, s in zip(place, slack))
        cropped = pixels[top : top + height, left : left + width].permute(2, 0, 1)
        sizes = torch.tensor([*self.original, top, left, height, width], dtype=torch.float32)
        return cropped.float() / 127.5 - 1, sizes


def open_image(image: Path | bytes | Image.Image) -> Image.Image:
    """The image, its header read. Raises what Pillow raises."""
    if isinstance(image, Image.Image):
        return image
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)


def upright_size(image: Image.Image) -> Size:
    """Height and width as it is to be looked at; only the header is read."""
    width, height = image.size
    # Pillow decodes a whole PNG to look for orientation behind the pixels, where hardly any program writes it.
    known = {} if image.format == "PNG" and "exif" not in image.info else image.getexif()
    return (width, height) if known.get(_ORIENTATION, 1) >= 5 else (height, width)


def cover(image: Image.Image, size: Size) -> Cover:
    """Decode, turn upright, make it RGB (on white where it is transparent), resize with a Lanczos filter."""
    image = _rgb(ImageOps.exif_transpose(image))
    original = image.height, image.width
    scale = max(size[0] / image.height, size[1] / image.width)
    height, width = (max(side, round(of * scale)) for side, of in zip(size, original))
    if (height, width) != original:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return Cover(torch.from_numpy(np.array(image)), original, size)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _log_aspect(size: Size) -> float:
    return math.log(size[1] / size[0])
