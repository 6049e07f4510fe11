"""Latents and text of images on disk, computed once: training then needs no encoder.

    <folder>/cache.json                    what it was computed from: encoders, images, framing
             index.safetensors             of each image its bucket and its captions' numbers
             text-00000.safetensors        conditions of the captions, each distinct one once
             latents-00-00000.safetensors  of a bucket's images, in their order: latents, SDXL's sizes, readable or not

Every file is written aside and renamed, so it is whole or not there; a run that was killed goes on with the next one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..condition import Condition, cat
from ..config import require
from ..draws import Draws
from ..files import partial, publish, write_text
from ..pipelines import weights_digest
from ..teacher import Teacher
from ..world import World
from .data import caption_numbers, flips, own_part, views
from .framing import Framing
from .plan import Plan
from .reading import Images
from .sources import Source

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FACTS, _INDEX = "cache.json", "index.safetensors"


class CacheError(ValueError):
    """A cache of something else, or one that is not whole. The message names the file or what differs."""


def cache_images(
    source: Source,
    framing: Framing,
    teacher: Teacher,
    folder: str | Path,
    *,
    dtype: str = "float32",
    max_unreadable: float = 0.05,
    workers: int = 4,
    batch_size: int = 16,
    shard_size: int = 1024,
    world: World | None = None,
    report: Callable[[int, int], None] | None = None,
) -> ImageCache:
    """Encode what is not encoded yet, and open the cache.

    Args:
        source, framing: the images; their crop must be "center". With `flip` both views are kept.
        teacher: whose autoencoder (the posterior's mean) and text encoders are used.
        folder: new, empty, or of a cache of the same.
        dtype: of what is stored: "float32", "bfloat16" or "float16".
        max_unreadable, workers: as in `Images`.
        batch_size: images or captions encoded at once.
        shard_size: images or captions per file.
        world: processes that share the work by files, each of them calling this.
        report: called with the number of files that are done and of all.

    Raises:
        CacheError: the folder holds something else.
        ValueError: a crop that is drawn anew each time, an unknown dtype.
        TooManyUnreadable: more images than allowed cannot be read.
    """
    require("crop", framing.crop, framing.crop == "center", "center where images are cached: one crop is kept of each")
    require("dtype", dtype, dtype in DTYPES, f"one of {', '.join(DTYPES)}")
    world, folder = world or World(), Path(folder)
    facts = _facts(source, framing, teacher, dtype, shard_size)
    _refuse_others(folder, facts)
    world.wait()
    options = {"max_unreadable": max_unreadable, "workers": workers}
    images = None
    if world.is_first and not (folder / _INDEX).is_file():
        images = Images(source, framing, **options)
        _write_index(images, folder, facts)
    world.wait()
    index = _load(folder / _INDEX)
    images = images or Images(source, framing, buckets=index["buckets"], **options)
    files = _files(images, index, shard_size)
    own = [name for number, name in enumerate(files) if number % world.size == world.rank]
    missing = [name for name in own if not (folder / name).is_file()]
    texts = _distinct_captions(source)[0] if any(name.startswith("text") for name in missing) else []
    for number, name in enumerate(missing):
        if report is not None:
            report(len(own) - len(missing) + number, len(own))
        bucket, part = files[name]
        if bucket is None:
            tensors, metadata = _encoded_text(texts[part], teacher, batch_size), {}
        else:
            tensors, metadata = _encoded_images(images, bucket, part, teacher, batch_size)
        _write(folder / name, _as(DTYPES[dtype], tensors), metadata)
    if report is not None:
        report(len(own), len(own))
    world.wait()
    return ImageCache(folder, images)


class ImageCache:
    """A whole cache, memory-mapped.

    Attributes:
        images: their source, framing and buckets.
        readable: (N,) bool.

    Raises:
        CacheError: a file that is missing, truncated, or of another cache.
        TooManyUnreadable: more images than allowed could not be read.
    """

    def __init__(self, folder: Path, images: Images) -> None:
        self.folder, self.images = folder, images
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        self.with_sizes, self._per_file = facts["sizes"], facts["images_per_file"]
        index = _load(folder / _INDEX)
        self._captions, self._first_caption = index["captions"], index["first_caption"]
        self._opened: dict[str, Any] = {name: _open(folder / name) for name in _files(images, index, self._per_file)}
        self.readable = torch.zeros(len(images), dtype=torch.bool)
        self._place = torch.zeros(len(images), dtype=torch.int64)
        failures = _noted(_open(folder / _INDEX))
        for bucket, members in enumerate(images.members):
            self._place[members] = torch.arange(len(members))
            for number, part in enumerate(members.split(self._per_file) if len(members) else ()):
                file = self._opened[_latents_name(bucket, number)]
                self.readable[part] = file.get_tensor("readable").bool()
                failures += _noted(file)
        for place, reason in failures:
            images.note(place, reason)
        for bucket, members in enumerate(images.members):
            if len(members) and not bool(self.readable[members].any()):
                raise CacheError(f"{folder}: no image of the bucket {images.sizes[bucket]} can be read; take them out")

    def captions(self, index: int) -> int:
        """How many captions an image has."""
        return int(self._first_caption[index + 1] - self._first_caption[index])

    def condition(self, captions: list[tuple[int, int]], sizes: Tensor) -> Condition:
        """float32, of (image, number of its caption) pairs; `sizes` (B, 6) for networks that take any."""
        rows = []
        for index, number in captions:
            shard, row = divmod(int(self._captions[int(self._first_caption[index]) + number]), self._per_file)
            file = self._opened[_text_name(shard)]
            parts = [_row(file, part, row) if part in file.keys() else None for part in ("states", "pooled")]  # noqa: SIM118
            rows.append(Condition(*parts))
        condition = cat(rows)
        return Condition(condition.states, condition.pooled, sizes if self.with_sizes else None)

    def latents(self, bucket: int, index: int, mirrored: bool) -> tuple[Tensor, Tensor]:
        """float32: latents (1, C, h, w) of a view of an image, and SDXL's sizes (1, 6)."""
        shard, row = divmod(int(self._place[index]), self._per_file)
        file = self._opened[_latents_name(bucket, shard)]
        return _row(file, "latents", row)[:, int(mirrored)], _row(file, "sizes", row)


class CachedImageData:
    """What `ImageData` gives, from a cache: the same images, views and captions at the same places of a run.

    Args:
        cache: of the images.
        seed: of the order.
        pixels: whether batches have `image` too, for which the images are read and decoded as before; only losses on
            pixels need it.
        ahead: batches that are decoded before they are asked for.
    """

    def __init__(self, cache: ImageCache, *, seed: int = 0, pixels: bool = True, ahead: int = 2) -> None:
        require("ahead", ahead, ahead >= 0, "0 or more")
        self.cache, self.pixels, self.ahead = cache, pixels, ahead
        self.plan = Plan(cache.images.members, seed)

    def batch(self, first: int, draws: Draws) -> dict[str, Any]:
        """`noise`, `condition`, `data`; with pixels also `image`. On the device of `draws`, float32."""
        cache, images = self.cache, self.cache.images
        number = first // draws.whole_batch
        bucket, chosen = self._readable_part(number, draws)
        mirrored = flips(images, draws)
        indices = chosen.tolist()
        latents, sizes = zip(*(cache.latents(bucket, index, flip) for index, flip in zip(indices, mirrored)))
        captions = caption_numbers([cache.captions(index) for index in indices], draws)
        condition = cache.condition(list(zip(indices, captions)), torch.cat(sizes)).to(draws.device)
        data = torch.cat(latents).to(draws.device)
        batch = {"noise": draws.randn(*data.shape[1:]), "condition": condition, "data": data}
        if self.pixels:
            following = [self._readable_part(number + step, draws) for step in range(1, self.ahead + 1)]
            reads = images.read(bucket, chosen, following)
            changed = [images.source.name(index) for index, read in zip(indices, reads) if read.index != index]
            if changed:
                raise CacheError(f"{cache.folder}: {changed[0]} could be read when it was cached, and now it cannot")
            batch["image"] = views(images, reads, draws)[0].to(draws.device)
        return batch

    def figures(self) -> dict[str, float]:
        """For the log: how many images could not be read."""
        return {"unreadable_images": float(len(self.cache.images.unreadable))}

    def _readable_part(self, number: int, draws: Draws) -> tuple[int, Tensor]:
        bucket, chosen = own_part(self.plan, number, draws)
        candidates, readable = self.cache.images.candidates, self.cache.readable
        return bucket, torch.tensor(
            [next(other for other in candidates(index, bucket) if readable[other]) for index in chosen.tolist()]
        )


def _facts(source: Source, framing: Framing, teacher: Teacher, dtype: str, shard_size: int) -> dict[str, Any]:
    pipeline = teacher.pipeline
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    return {
        "format": FORMAT,
        "images": source.digest(),
        "count": len(source),
        "framing": asdict(framing),
        "autoencoder": weights_digest(pipeline.vae),
        "text_encoders": [weights_digest(encoder) for encoder in encoders if encoder is not None],
        "sizes": teacher.is_sdxl,
        "dtype": dtype,
        "images_per_file": shard_size,
    }


def _refuse_others(folder: Path, facts: dict[str, Any]) -> None:
    if not (folder / _FACTS).is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CacheError(f"{folder}: holds something else; needed a new folder, or a cache of these images")
        return
    try:
        theirs = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CacheError(f"{folder / _FACTS}: not JSON ({error})") from error
    different = [name for name in facts if theirs.get(name) != facts[name]]
    if different:
        shown = "; ".join(f"{name} is {theirs.get(name)} there and {facts[name]} here" for name in different)
        raise CacheError(f"{folder}: a cache of something else: {shown}")


def _write_index(images: Images, folder: Path, facts: dict[str, Any]) -> None:
    _, captions = _distinct_captions(images.source)
    counts = torch.tensor([0, *(len(of_one) for of_one in captions)])
    index = {
        "buckets": images.buckets,
        "captions": torch.tensor([number for of_one in captions for number in of_one], dtype=torch.int64),
        "first_caption": counts.cumsum(0),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _FACTS, json.dumps(facts, indent=2) + "\n")
    _write(folder / _INDEX, index, _failures(images.failed))


def _distinct_captions(source: Source) -> tuple[list[str], list[list[int]]]:
    """Each caption once, in the order in which they come, and of each image the numbers of its captions."""
    numbers: dict[str, int] = {}
    of_images = []
    for index in range(len(source)):
        try:
            captions = source.captions(index)
        except Exception:  # reading the image will find, count and name it
            captions = ()
        of_images.append([numbers.setdefault(caption, len(numbers)) for caption in captions])
    return list(numbers), of_images


def _files(images: Images, index: Mapping[str, Tensor], per_file: int) -> dict[str, tuple[int | None, slice]]:
    """Every file of text and latents by name: its bucket, None for text, and its part of the texts or members."""
    texts = int(index["captions"].max()) + 1 if len(index["captions"]) else 0
    files: dict[str, tuple[int | None, slice]] = {}
    for number, part in enumerate(_parts(texts, per_file)):
        files[_text_name(number)] = (None, part)
    for bucket, members in enumerate(images.members):
        for number, part in enumerate(_parts(len(members), per_file)):
            files[_latents_name(bucket, number)] = (bucket, part)
    return files


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, length)) for first in range(0, length, size))


def _text_name(number: int) -> str:
    return f"text-{number:05d}.safetensors"


def _latents_name(bucket: int, number: int) -> str:
    return f"latents-{bucket:02d}-{number:05d}.safetensors"


def _encoded_text(texts: list[str], teacher: Teacher, batch_size: int) -> dict[str, Tensor]:
    condition = teacher.encode(texts, batch_size)
    return {"states": condition.states} | ({} if condition.pooled is None else {"pooled": condition.pooled})


def _encoded_images(
    images: Images, bucket: int, part: slice, teacher: Teacher, batch_size: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    members = images.members[bucket][part]
    flip = (False, True) if images.framing.flip else (False,)
    height, width = images.sizes[bucket]
    blank = torch.zeros(3, height, width)
    latents, sizes, readable, failures = [], [], [], {}
    for some in members.split(batch_size):
        reads = images.read_alone(bucket, some.tolist())
        failures |= {index: reason for read in reads for index, reason in read.failures}
        seen = [[(blank, torch.zeros(6))] * len(flip) if r.image is None else [r.image.view(None, f) for f in flip]
                for r in reads]  # fmt: skip
        pixels = torch.stack([view for of_one in seen for view, _ in of_one]).to(teacher.device)
        latents.append(teacher.encode_images(pixels).unflatten(0, (len(reads), len(flip))))
        sizes += [of_one[0][1] for of_one in seen]
        readable += [read.image is not None for read in reads]
    tensors = {"latents": torch.cat(latents), "sizes": torch.stack(sizes), "readable": torch.tensor(readable).byte()}
    return tensors, _failures(failures)


def _as(dtype: torch.dtype, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the encoders made in another dtype; sizes stay exact."""
    return {name: t.to(dtype) if name in ("states", "pooled", "latents") else t for name, t in tensors.items()}


def _failures(failures: Mapping[int, str]) -> dict[str, str]:
    return {"unreadable": json.dumps(sorted(failures.items()))}


def _noted(file: Any) -> list[tuple[int, str]]:
    return json.loads((file.metadata() or {}).get("unreadable", "[]"))


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    scratch = partial(path)
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, scratch, metadata)
        scratch.chmod(0o644)
        publish(path)
    except (OSError, SafetensorError) as error:
        scratch.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error}); what was cached before is there") from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path}: missing or damaged ({error}); remove it, and it is computed anew") from error


def _load(path: Path) -> dict[str, Tensor]:
    file = _open(path)
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _row(file: Any, name: str, row: int) -> Tensor:
    return file.get_slice(name)[row : row + 1].float()
