"""Small images with captions, in folders, datasets and tar files, some of them broken."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

SIZES = ((40, 40), (32, 64), (64, 32), (50, 36))  # height, width


def picture(number):
    """An image of smooth colours that no other number has."""
    height, width = SIZES[number % len(SIZES)]
    y, x = np.mgrid[0:height, 0:width]
    colours = [(y * 3 + number * 7) % 256, (x * 3 + number * 29) % 256, (x + y + number * 53) % 256]
    return Image.fromarray(np.stack(colours, -1).astype(np.uint8))


def caption(number):
    return f"digit {number % 10}"


def encoded(number):
    """Lossless, so that what is read is what was drawn."""
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder, count, broken=()):
    """000.png, 001.png, …, each with its caption beside it; broken ones are cut short, or are no image at all."""
    folder.mkdir(parents=True)
    for number in range(count):
        content = encoded(number)
        if number in broken:
            content = content[: len(content) // 2] if number % 2 else b"no image"
        (folder / f"{number:03d}.png").write_bytes(content)
        (folder / f"{number:03d}.txt").write_text(caption(number) + "\n", encoding="utf-8")
    return folder


def write_tar(path, numbers, captions="txt"):
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            text = caption(number) if captions == "txt" else json.dumps({"caption": caption(number), "width": 3})
            for suffix, content in (("png", encoded(number)), (captions, text.encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path
