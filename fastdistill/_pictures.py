"""Small things done to pictures before they are written."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def enlarge(image: Image.Image, factor: int) -> Image.Image:
    """`image` with `factor` times as many pixels along each side, interpolated smoothly (Lanczos)."""
    if factor == 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)


def grid(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size side by side, row by row, in the shape of `grid_columns`; cells left over are black."""
    columns = grid_columns(len(images))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet


def grid_columns(count: int) -> int:
    """Between a square and twice as wide as high, with as few empty cells as possible: 10 images are 5 x 2."""
    square = math.ceil(math.sqrt(count))
    return min(range(square, 2 * square + 1), key=lambda columns: (-count % columns, columns))


def png(image: Image.Image, text: Mapping[str, str] | None = None) -> bytes:
    """The PNG file of `image`, with `text` in it for those who later wonder where the picture is from."""
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_itxt(key, value)
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=chunks, optimize=True)
    return file.getvalue()
