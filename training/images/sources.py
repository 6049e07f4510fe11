"""Images with captions by number: a folder, a Hugging Face dataset, webdataset tar files. Nothing is decoded here."""

from __future__ import annotations

import hashlib
import importlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2")
METADATA = ("metadata.jsonl", "captions.jsonl")


class SourceError(ValueError):
    """Images or captions that are not where they were said to be; known before anything is decoded or trained."""


class Source(Protocol):
    """Images with captions, by number, so that any place of a run can be found again."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What an image is called in messages."""

    def captions(self, index: int) -> tuple[str, ...]:
        """All that is said of it; one is drawn each time. Raises what reading them raises."""

    def image(self, index: int) -> Path | bytes | Image.Image:
        """The encoded image, or where it is. Raises what reading it raises."""

    def digest(self) -> str:
        """SHA-256 of what tells this set from another one; no image is read for it."""


class ImageFolder:
    """A folder of images, subfolders included, in the order of their names; hidden files are left alone.

    Captions stand in `photo.txt` beside `photo.jpg`, every line that is not empty being one; or in one file
    `metadata.jsonl` (or `captions.jsonl`) as Hugging Face's ImageFolder reads it, one object per image with
    `file_name`, relative to the folder, and its caption or a list of them, in the order of the lines.

    Args:
        folder: to look in.
        caption: the captions' name in the metadata file.

    Raises:
        SourceError: no folder, no images, captions that are missing, or a metadata file that cannot be read.
    """

    def __init__(self, folder: str | Path, caption: str = "text") -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise SourceError(f"{folder}: no such folder")
        self._files = sorted(path for path in self.folder.rglob("*") if _is_image(path))
        if not self._files:
            raise SourceError(f"{folder}: no images in it; known are {', '.join(SUFFIXES)}")
        metadata = next((self.folder / name for name in METADATA if (self.folder / name).is_file()), None)
        self._captions: list[tuple[str, ...]] | None = None
        if metadata is None:
            without = [path for path in self._files if not path.with_suffix(".txt").is_file()]
            _refuse_missing(without, f"needed a .txt beside each, or a {METADATA[0]}")
        else:
            lines = _read_metadata(metadata, caption)
            _refuse_missing([path for path in lines if not path.is_file()], f"{metadata} names them", "file")
            _refuse_missing([path for path in self._files if path not in lines], f"needed a line in {metadata}")
            self._files, self._captions = list(lines), list(lines.values())

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return str(self._files[index])

    def captions(self, index: int) -> tuple[str, ...]:
        if self._captions is not None:
            return self._captions[index]
        lines = self._files[index].with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        return tuple(line.strip() for line in lines if line.strip()) or ("",)

    def image(self, index: int) -> Path:
        return self._files[index]

    def digest(self) -> str:
        names = (path.relative_to(self.folder).as_posix() for path in self._files)
        return _digest((name, path.stat().st_size) for name, path in zip(names, self._files))


class HuggingFaceDataset:
    """A dataset of the `datasets` library: a folder of `save_to_disk`, or whatever `load_dataset` finds by that name.

    Args:
        name: of the folder, or of the dataset.
        split: of it.
        image, caption: columns; captions are strings, or lists of them.

    Raises:
        ImportError: the library is not installed.
        SourceError: no such dataset, split or column, no images, or captions that are missing.
    """

    def __init__(self, name: str | Path, split: str = "train", image: str = "image", caption: str = "text") -> None:
        datasets = _library("datasets")
        dataset = _load_dataset(datasets, str(name), split)
        for column in (image, caption):
            if column not in dataset.column_names:
                raise SourceError(f"{name}: no column {column!r}; there are {', '.join(dataset.column_names)}")
        if not isinstance(dataset.features[image], datasets.Image):
            raise SourceError(f"{name}: column {image!r} holds {dataset.features[image]}; needed images")
        if not len(dataset):
            raise SourceError(f"{name}: no images in it")
        self._dataset = dataset.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False))
        self._label, self._image, self._caption = f"{Path(name).name}/{split}", image, caption
        texts = self._texts = self._dataset.select_columns([caption])
        without = [self.name(index) for index in range(len(texts)) if not _is_caption(texts[index][caption])]
        _refuse_missing(without, f"needed strings, or lists of them, in column {caption!r}")

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        return f"{self._label}[{index}]"

    def captions(self, index: int) -> tuple[str, ...]:
        return _as_captions(self._texts[index][self._caption])

    def image(self, index: int) -> Path | bytes:
        stored = self._dataset[index][self._image]
        return Path(stored["path"]) if stored["bytes"] is None else stored["bytes"]

    def digest(self) -> str:
        return _digest((index, *self.captions(index)) for index in range(len(self)))


class _Member(NamedTuple):
    """Where a file lies in a tar file."""

    tar: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class TarFiles:
    """Webdataset tar files on disk. Their headers are read once; then every sample is found by number.

    Reading them as a stream would be simpler and would lose the place in the data: after a resume the stream begins
    anew. So compressed tar files and addresses on other machines are refused.

    Args:
        pattern: a folder of them, or of the files: `*` as in a shell, `{00000..00099}` as in webdataset; several joined
            by `::`.
        image: the extensions of images, joined by `;`; the first that a sample has is taken.
        caption: an extension ("txt", every line that is not empty being a caption), or a value in a JSON member
            ("json.caption").

    Raises:
        ImportError: the library is not installed.
        SourceError: no such files, one that cannot be read, or samples without an image or a caption.
    """

    def __init__(self, pattern: str | Path, image: str = "jpg;jpeg;png;webp", caption: str = "txt") -> None:
        library = _library("webdataset")
        patterns = library.shardlists.expand_urls(str(pattern))
        remote = [url for url in patterns if "://" in url or url.startswith("pipe:")]
        if remote:
            raise SourceError(f"{remote[0]}: needed tar files on disk, where a sample can be found by number")
        self._tars = [path for url in patterns for path in _tars(url)]
        self._caption, _, self._field = caption.partition(".")
        kinds = image.lower().split(";")
        self._samples: list[tuple[str, _Member, _Member]] = []
        without = []
        for tar in self._tars:
            for sample in library.tariterators.group_by_keys(_members(tar)):
                name = f"{Path(tar).name}/{sample['__key__']}"
                found = next((kind for kind in kinds if kind in sample), None)
                if found is None or self._caption not in sample:
                    has = ", ".join(key for key in sample if not key.startswith("__"))
                    without.append(f"{name} (has {has})")
                else:
                    self._samples.append((f"{name}.{found}", sample[found], sample[self._caption]))
        _refuse_missing(
            without, f"needed one of {', '.join(kinds)} as an image, and {self._caption}", "image or caption"
        )
        if not self._samples:
            raise SourceError(f"{pattern}: no samples in {len(self._tars)} tar files")

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        return self._samples[index][0]

    def captions(self, index: int) -> tuple[str, ...]:
        text = self._samples[index][2].read().decode("utf-8")
        if not self._field:
            return tuple(line.strip() for line in text.splitlines() if line.strip()) or ("",)
        value = json.loads(text).get(self._field)
        if not _is_caption(value):
            raise ValueError(f"no caption in {self._field!r} of its JSON: {value!r}")
        return _as_captions(value)

    def image(self, index: int) -> bytes:
        return self._samples[index][1].read()

    def digest(self) -> str:
        return _digest((name, image.size, text.size) for name, image, text in self._samples)


def _tars(pattern: str) -> list[str]:
    wanted = f"{pattern}/*.tar" if Path(pattern).is_dir() else pattern
    return sorted(glob(wanted)) or [pattern]


def _members(tar: str) -> Iterator[dict[str, Any]]:
    """What webdataset groups into samples, each file's place instead of its bytes."""
    try:
        if Path(tar).stat().st_size % tarfile.BLOCKSIZE:  # tarfile takes a header that is cut for the end
            raise tarfile.ReadError("truncated: its size is no multiple of 512 bytes")
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                if member.isfile():
                    place = _Member(tar, member.offset_data, member.size)
                    yield {"fname": member.name, "data": place, "__url__": tar}
    except (OSError, tarfile.TarError) as error:
        raise SourceError(f"{tar}: cannot be read as an uncompressed tar file ({error})") from error


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _read_metadata(file: Path, caption: str) -> dict[Path, tuple[str, ...]]:
    found: dict[Path, tuple[str, ...]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise SourceError(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(values, Mapping) or not isinstance(values.get("file_name"), str):
            raise SourceError(f"{file}, line {number}: needed an object with file_name")
        if not _is_caption(values.get(caption)):
            known = ", ".join(name for name in values if name != "file_name")
            raise SourceError(
                f"{file}, line {number}: no caption in {caption!r}; there are {known or 'no other values'}"
            )
        found[file.parent / values["file_name"]] = _as_captions(values[caption])
    return found


def _load_dataset(datasets: ModuleType, name: str, split: str) -> Any:
    saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        dataset = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
    except Exception as error:  # the library has no common class for what it finds wrong
        raise SourceError(f"{name}: the datasets library cannot open it ({error})") from error
    if isinstance(dataset, Mapping):
        if split not in dataset:
            raise SourceError(f"{name}: no split {split!r}; there are {', '.join(dataset)}")
        return dataset[split]
    return dataset


def _is_caption(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(each, str) for each in value)


def _as_captions(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _refuse_missing(names: Sequence[Any], needed: str, what: str = "caption") -> None:
    if names:
        shown = ", ".join(map(str, names[:5])) + (", …" if len(names) > 5 else "")
        count = "1 image" if len(names) == 1 else f"{len(names)} images"
        raise SourceError(f"{count} without {what}: {shown}; {needed}")


def _digest(facts: Iterable[tuple]) -> str:
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(json.dumps(fact).encode())
    return digest.hexdigest()


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'these images need {name}: pip install "fastdistill[images]"') from error
