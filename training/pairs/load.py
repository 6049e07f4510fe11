"""A set of pairs as the methods take it: rows that are read from the disk when a batch asks for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..pipelines import weights_digest
from ..teacher import Teacher
from .memory import Pairs
from .pair_set import PairSet, PairSetError, prompts_facts, read_set
from .shards import read_record, shard_file


class Rows:
    """The rows of a tensor (N, ...) that lies in several files.

    Indexed with an int64 tensor, a list or a slice it gives a tensor on `device`, as a tensor would; the files are
    mapped, so that memory holds what is used.

    Args:
        length: N.
        shard_size: rows of a file.
        read: from a shard's number and rows (n,) within it to (n, ...).
        device: of what indexing gives.
    """

    def __init__(
        self, length: int, shard_size: int, read: Callable[[int, Tensor], Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self._length, self._shard_size, self._read, self.device = length, shard_size, read, torch.device(device)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> Tensor:
        if isinstance(index, slice):
            index = torch.arange(self._length)[index]
        index = torch.as_tensor(index).cpu()
        shard = index.div(self._shard_size, rounding_mode="floor")
        rows = None
        for number in shard.unique().tolist() or [0]:
            here = (shard == number).nonzero().squeeze(1)
            part = self._read(number, index[here] % self._shard_size)
            rows = part.new_empty(len(index), *part.shape[1:]) if rows is None else rows
            rows[here] = part
        return rows.to(self.device)


def load_pairs(
    folder: str | Path,
    *,
    teacher: Teacher | None = None,
    prompts: Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> Pairs:
    """The pairs of a set that is whole.

    Args:
        folder: of the set.
        teacher: the set must be of its UNet.
        prompts: what the conditions of the pairs shall be indices into; None: into the lines that the set was made of.
        device: of batches; the teacher's by default, else the CPU.

    Returns:
        `noise` and `sample` as `Rows`, which are read when they are indexed.

    Raises:
        PairSetError: no set, shards that are missing or cut off, another teacher, or pairs of prompts that are not
            among `prompts`. Whether the files are as they were written is for `verify` to find: it reads them all.
    """
    folder = Path(folder)
    pair_set = read_set(folder)
    if teacher is not None and pair_set.unet_sha256 != (digest := weights_digest(teacher.unet)):
        raise PairSetError(
            f"{folder}: made by {pair_set.teacher} ({pair_set.unet_sha256[:12]}), "
            f"not by this teacher, {teacher.name} ({digest[:12]})"
        )
    _check_whole(folder, pair_set)
    device = device or ("cpu" if teacher is None else teacher.device)
    files = [safe_open(shard_file(folder, shard), framework="pt") for shard in range(pair_set.shards)]
    stored = {
        name: [file.get_tensor(name) for file in files]  # mapped: read when it is looked at
        for name in ("latent", "noise", "prompt")
        if name != "noise" or pair_set.noise == "stored"
    }

    def rows_of(name: str) -> Rows:
        return Rows(pair_set.count, pair_set.shard_size, lambda shard, rows: stored[name][shard][rows], device)

    def drawn(shard: int, rows: Tensor) -> Tensor:
        return pair_set.noise_of((rows + shard * pair_set.shard_size).tolist())

    noise = rows_of("noise") if "noise" in stored else Rows(pair_set.count, pair_set.shard_size, drawn, device)
    condition = torch.cat(stored["prompt"])
    if prompts is not None and prompts_facts(prompts)["prompts_sha256"] != pair_set.prompts_sha256:
        condition = _among(prompts, [text for file in files for text in json.loads(file.metadata()["prompts"])], folder)
    return Pairs(noise, rows_of("latent"), condition.to(device))


def _check_whole(folder: Path, pair_set: PairSet) -> None:
    missing = [shard for shard in range(pair_set.shards) if not shard_file(folder, shard).is_file()]
    if missing:
        raise PairSetError(
            f"{folder}: {len(missing)} of {pair_set.shards} shards are missing, the first is "
            f"{shard_file(folder, missing[0]).name}; the command that made the set goes on with it"
        )
    for shard in range(pair_set.shards):
        file = shard_file(folder, shard)
        try:
            size = read_record(folder, shard).bytes
            if file.stat().st_size != size:
                raise PairSetError(f"{file}: {file.stat().st_size} bytes, {size} were written")
            safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise PairSetError(f"{file}: cannot be read ({error})") from error


def _among(prompts: Sequence[str], texts: list[str], folder: Path) -> Tensor:
    places = {prompt: place for place, prompt in enumerate(prompts)}
    unknown = sorted({text for text in texts if text not in places})
    if unknown:
        raise PairSetError(
            f"{folder}: {len(unknown)} of its prompts are not among the {len(prompts)} of this run, "
            f"for example {unknown[0]!r}"
        )
    return torch.tensor([places[text] for text in texts])
