"""Whether a set is what it says: every file opened, every number looked at, every noise drawn again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..condition import Condition
from ..files import sha256
from ..teacher import Teacher
from .pair_set import FILE, PairSet, read_set
from .shards import read_record, record_file, shard_file
from .source import Source

TEXT = tuple(field.name for field in fields(Condition))
# Root mean square of the difference over that of the latents. Batches of another size, another device or TensorFloat-32
# round otherwise; a step more or less, or another guidance scale, changes more.
TOLERANCES = {"float32": 1e-2, "float16": 1e-1, "bfloat16": 1e-1}


class Problem(NamedTuple):
    """What is wrong, and in which file of the set."""

    file: str
    what: str


def verify(
    folder: str | Path,
    *,
    teacher: Teacher | None = None,
    samples: int = 4,
    report: Callable[[int, int], None] | None = None,
) -> list[Problem]:
    """Everything that is wrong with a set; an empty list says that it is whole and as it was written.

    Args:
        folder: of the set.
        teacher: by whom it should be made; some pairs are solved again. None: not compared.
        samples: how many, spread over the set.
        report: called with (shards looked at, shards).

    Raises:
        PairSetError: there is no set.
    """
    folder = Path(folder)
    pair_set = read_set(folder)
    problems = _foreign(folder, pair_set)
    texts: dict[int, str] = {}
    for shard in range(pair_set.shards):
        file = shard_file(folder, shard)
        problems += [Problem(file.name, what) for what in _shard_problems(folder, pair_set, shard, texts)]
        if report is not None:
            report(shard + 1, pair_set.shards)
    if teacher is not None:
        problems += _teacher_problems(folder, pair_set, teacher, samples)
    return problems


def _foreign(folder: Path, pair_set: PairSet) -> list[Problem]:
    shards = {shard_file(folder, shard).name for shard in range(pair_set.shards)}
    found = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    return [
        Problem(name, f"does not belong to a set of {pair_set.shards} shards") for name in found if name not in shards
    ]


def _shard_problems(folder: Path, pair_set: PairSet, shard: int, texts: dict[int, str]) -> list[str]:
    file = shard_file(folder, shard)
    if not file.is_file():
        return ["is missing"]
    problems = []
    try:
        record = read_record(folder, shard)
    except (OSError, ValueError) as error:
        problems.append(f"its record {record_file(folder, shard).name} cannot be read ({error})")
    else:
        size = file.stat().st_size
        if size < record.bytes:
            return [f"is cut off: {size} of {record.bytes} bytes"]
        if size != record.bytes or sha256(file) != record.sha256:
            problems.append("was changed after it was written: its SHA-256 is another than its record's")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        return [*problems, f"cannot be opened ({error})"]
    problems += _metadata_problems(pair_set, metadata)
    form = _form_problems(pair_set, pair_set.span(shard), tensors)
    if form:
        return problems + form
    return problems + _content_problems(folder, pair_set, shard, tensors, metadata, texts)


def _metadata_problems(pair_set: PairSet, metadata: dict[str, str]) -> list[str]:
    own = {name: value for name, value in asdict(pair_set).items() if name not in ("teacher", "fastdistill")}
    wanted = {name: json.dumps(value) for name, value in own.items()}
    return [
        f"is of another set: {name} is {metadata.get(name, 'not there')}, in {FILE} {value}"
        for name, value in wanted.items()
        if metadata.get(name) != value
    ]


def _form_problems(pair_set: PairSet, span: range, tensors: dict[str, Tensor]) -> list[str]:
    n = len(span)
    sample = ((n, *pair_set.sample_shape), torch.float32)
    wanted = {"pair": ((n,), torch.int64), "prompt": ((n,), torch.int64), "latent": sample}
    if pair_set.noise == "stored":
        wanted["noise"] = sample
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    for name in wanted.keys() & tensors.keys():
        found = (tuple(tensors[name].shape), tensors[name].dtype)
        if found != wanted[name]:
            problems.append(f"{name} is {_named(*found)}; needed {_named(*wanted[name])}")
    allowed = (*wanted, *(TEXT if pair_set.text else ()))
    problems += [f"{name} does not belong there" for name in tensors if name not in allowed]
    if pair_set.text and "states" not in tensors:
        problems.append("states is missing")
    problems += [
        f"{name} has {len(tensors[name])} rows; needed {n}" for name in TEXT if len(tensors.get(name, span)) != n
    ]
    return problems


def _named(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{shape} {str(dtype).removeprefix('torch.')}"


def _content_problems(
    folder: Path,
    pair_set: PairSet,
    shard: int,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    texts: dict[int, str],
) -> list[str]:
    span = pair_set.span(shard)
    if not torch.equal(tensors["pair"], torch.tensor(span)):
        return [_wrong_pairs(folder, pair_set, shard, tensors["pair"])]
    problems = [f"{name} is not finite in {_pairs(span, bad)}" for name, bad in _not_finite(tensors) if bad.any()]
    problems += _noise_problems(pair_set, span, tensors)
    if not torch.equal(tensors["prompt"], pair_set.prompts_of(span)):
        return [*problems, f"the prompts are not those of seed {pair_set.seed}"]
    return problems + _text_problems(tensors["prompt"].tolist(), metadata, texts)


def _wrong_pairs(folder: Path, pair_set: PairSet, shard: int, pair: Tensor) -> str:
    span = pair_set.span(shard)
    first, last = int(pair[0]), int(pair[-1])
    owner = shard_file(folder, first // pair_set.shard_size) if 0 <= first < pair_set.count else None
    of = f", duplicates of {owner.name}" if owner is not None and owner.is_file() and first not in span else ""
    return f"holds the pairs {first} to {last}{of}; needed {span[0]} to {span[-1]}"


def _not_finite(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name, ~t.flatten(1).isfinite().all(1)) for name, t in tensors.items() if t.is_floating_point()]


def _noise_problems(pair_set: PairSet, span: range, tensors: dict[str, Tensor]) -> list[str]:
    noise, latent = pair_set.noise_of(span), tensors["latent"]
    is_noise = (latent == noise).flatten(1).all(1)
    if pair_set.noise == "seed":
        return [f"latent is the noise itself in {_pairs(span, is_noise)}"] if is_noise.any() else []
    other = (tensors["noise"] != noise).flatten(1).any(1)
    problems = []
    if is_noise.any():
        problems.append(f"noise and latent are swapped in {_pairs(span, is_noise)}")
    if (other & ~is_noise).any():
        where = other & ~is_noise
        std, mean = torch.std_mean(tensors["noise"][where])
        problems.append(
            f"noise is not that of seed {pair_set.seed} in {_pairs(span, where)}: "
            f"mean {mean:.3f}, standard deviation {std:.3f}"
        )
    return problems


def _text_problems(lines: list[int], metadata: dict[str, str], texts: dict[int, str]) -> list[str]:
    try:
        found = json.loads(metadata["prompts"])
    except (KeyError, ValueError):
        return ["the prompts are not in its metadata"]
    if not isinstance(found, list) or len(found) != len(lines):
        return ["its metadata does not have one prompt per pair"]
    wrong = [(line, text) for line, text in zip(lines, found) if texts.setdefault(line, text) != text]
    return [f"prompt {line} is {text!r} here and {texts[line]!r} elsewhere" for line, text in wrong[:1]]


def _pairs(span: range, where: Tensor) -> str:
    """How many pairs, and the first of them."""
    count = int(where.sum())
    first = span[int(where.nonzero()[0])]
    return f"pair {first}" if count == 1 else f"{count} pairs from {first} on"


def _teacher_problems(folder: Path, pair_set: PairSet, teacher: Teacher, samples: int) -> list[Problem]:
    source = Source.of(teacher, (), getattr(torch, pair_set.dtype))
    other = source.differences(pair_set)
    if other:
        return [Problem(FILE, f"made by another teacher, {pair_set.teacher}: {', '.join(other)} differ")]
    problems = []
    for pair in sorted({round(place) for place in torch.linspace(0, pair_set.count - 1, samples).tolist()}):
        shard, row = divmod(pair, pair_set.shard_size)
        file = shard_file(folder, shard)
        try:
            with safe_open(file, framework="pt") as opened:
                latent, prompt = opened.get_slice("latent")[row], json.loads(opened.metadata()["prompts"])[row]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError):
            continue  # what is wrong with the file was found already
        condition = teacher.encode([prompt]).to(source.dtype)
        solved = source.solve(pair_set, pair_set.noise_of([pair]), condition)[0].cpu()
        error = float((solved - latent).norm() / solved.norm())
        if not error <= TOLERANCES[pair_set.dtype]:
            problems.append(Problem(file.name, f"pair {pair} is not where the teacher's ODE ends: {error:.1%} off"))
    return problems
