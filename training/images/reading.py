"""Decoded images by number: unreadable ones are named, counted and replaced, and the next batches are read ahead."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import require
from .framing import Cover, Framing, cover, open_image, upright_size
from .sources import Source

_SHOWN = 50  # names in the message of a run that stops


class UnreadableImage(UserWarning):
    """An image, or its caption, that cannot be read. Another one takes its place."""


class TooManyUnreadable(RuntimeError):
    """More images than allowed cannot be read; the message names them with the reason of each."""


@dataclass(frozen=True)
class Read:
    """What became of one image of a batch.

    Attributes:
        index: of the image that was read: the one asked for, or the next readable one.
        image, captions: of that one; None and () if none was found before more than allowed had failed.
        failures: (index, reason) of those that could not be read on the way.
    """

    index: int
    image: Cover | None
    captions: tuple[str, ...]
    failures: list[tuple[int, str]] = field(default_factory=list)


class Images:
    """The images of a source in the sizes of a framing.

    With buckets the header of every image is read here, which finds some of the unreadable ones.

    Args:
        source, framing: what, and how large.
        max_unreadable: share of the source, in [0, 1), that may be unreadable.
        workers: threads that decode; 0 decodes when a batch is asked for.
        buckets: (N,) int64, of each image, -1 for one that has none, where that is known already.

    Attributes:
        members: (n,) int64 for each bucket, the numbers of its images, ascending.
        failed, unreadable: the reason of every image that could not be read so far, by number and by name.

    Raises:
        TooManyUnreadable: of the headers.
    """

    def __init__(
        self,
        source: Source,
        framing: Framing,
        *,
        max_unreadable: float = 0.05,
        workers: int = 4,
        buckets: Tensor | None = None,
    ) -> None:
        require("max_unreadable", max_unreadable, 0 <= max_unreadable < 1, "in [0, 1)")
        require("workers", workers, workers >= 0, "0 or more")
        self.source, self.framing = source, framing
        self.sizes = framing.sizes
        self.allowed = int(max_unreadable * len(source) + 1e-9)  # 0.29 of 100 are 29
        self.unreadable: dict[str, str] = {}
        self.failed: dict[int, str] = {}
        self._pool = ThreadPoolExecutor(workers, "images") if workers else None
        self._pending: dict[tuple[int, ...], list[Future[Read]]] = {}
        self.buckets = self._sort_into_buckets() if buckets is None else buckets
        self.members = [torch.nonzero(self.buckets == bucket).flatten() for bucket in range(len(self.sizes))]

    def __len__(self) -> int:
        return len(self.source)

    def read(self, bucket: int, chosen: Tensor, ahead: Sequence[tuple[int, Tensor]] = ()) -> list[Read]:
        """The images of a batch, an unreadable one replaced by the next readable one (`candidates`).

        Args:
            bucket, chosen: its number, and those of the images.
            ahead: the same of batches that are likely to be asked for next. Reading them begins, in threads; whether
                it does changes no result.

        Raises:
            TooManyUnreadable: more than allowed cannot be read.
        """
        if self._pool is None:
            reads = [self._readable(index, bucket) for index in chosen.tolist()]
        else:
            wanted = {tuple(some.tolist()): number for number, some in [(bucket, chosen), *ahead]}
            for key in [key for key in self._pending if key not in wanted]:
                for future in self._pending.pop(key):
                    future.cancel()
            for key, number in wanted.items():
                if key not in self._pending:
                    self._pending[key] = [self._pool.submit(self._readable, index, number) for index in key]
            reads = [future.result() for future in self._pending.pop(tuple(chosen.tolist()))]
        for read in reads:
            for index, reason in read.failures:
                self.note(index, reason)
        return reads

    def read_alone(self, bucket: int, indices: Sequence[int]) -> list[Read]:
        """Each of these images, none replaced: `image` is None where it cannot be read. Noted as in `read`."""
        each = map if self._pool is None else self._pool.map
        reads = list(each(lambda index: self._try(index, bucket), indices))
        for read in reads:
            for index, reason in read.failures:
                self.note(index, reason)
        return reads

    def candidates(self, index: int, bucket: int) -> Iterator[int]:
        """An image, then those that take its place if they can be read: of its bucket, and then of the others."""
        members = self.members[bucket]
        place = int(torch.searchsorted(members, index))
        for step in range(len(members)):
            yield int(members[(place + step) % len(members)])
        for others in (*self.members[bucket + 1 :], *self.members[:bucket]):
            yield from others.tolist()

    def note(self, index: int, reason: str) -> None:
        """An image cannot be read: say so, once, and stop if it is one too many."""
        if index in self.failed:
            return
        self.failed[index] = reason
        name = self.source.name(index)
        self.unreadable[name] = reason
        warnings.warn(f"{name}: unreadable, another image takes its place ({reason})", UnreadableImage, stacklevel=3)
        if len(self.unreadable) > self.allowed:
            shown = [f"  {name}: {reason}" for name, reason in list(self.unreadable.items())[:_SHOWN]]
            more = len(self.unreadable) - len(shown)
            raise TooManyUnreadable(
                f"{len(self.unreadable)} of {len(self)} images cannot be read; max_unreadable allows {self.allowed}:\n"
                + "\n".join(shown + [f"  … and {more} more"] * (more > 0))
            )

    def _readable(self, index: int, bucket: int) -> Read:
        failures: list[tuple[int, str]] = []
        for candidate in self.candidates(index, bucket):
            read = self._try(candidate, bucket)
            failures += read.failures
            if read.image is not None:
                return Read(candidate, read.image, read.captions, failures)
            if len(failures) > self.allowed:
                break
        return Read(index, None, (), failures)

    def _try(self, index: int, bucket: int) -> Read:
        if index in self.failed:
            return Read(index, None, (), [(index, self.failed[index])])
        # Whatever a decoder raises on bytes that are no image, and there is no list of it, concerns this image alone;
        # a mistake of another kind comes up with its reason as soon as more than allowed have it.
        try:
            with open_image(self.source.image(index)) as opened:
                return Read(index, cover(opened, self.sizes[bucket]), self.source.captions(index))
        except Exception as error:
            return Read(index, None, (), [(index, _reason(error))])

    def _sort_into_buckets(self) -> Tensor:
        if len(self.sizes) == 1:
            return torch.zeros(len(self), dtype=torch.int64)
        each = map if self._pool is None else self._pool.map
        buckets = []
        for index, found in enumerate(each(self._bucket_of, range(len(self)))):
            if isinstance(found, str):
                self.note(index, found)
            buckets.append(-1 if isinstance(found, str) else found)
        return torch.tensor(buckets)

    def _bucket_of(self, index: int) -> int | str:
        try:
            with open_image(self.source.image(index)) as opened:
                return self.framing.bucket(upright_size(opened))
        except Exception as error:
            return _reason(error)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")
