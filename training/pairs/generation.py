"""Making a set of pairs: any number of processes on one folder, each killed and started again as often as may be."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from ..config import require
from ..interruption import Interruption
from .pair_set import PairSet, agree
from .shards import claimed, shard_file, write_shard
from .source import Source

POLL_SECONDS = 0.2  # how often a process that has nothing left to claim looks whether the others are done


@dataclass(frozen=True)
class Progress:
    """Of a set while it is made.

    Attributes:
        done: pairs on the disk, whoever made them, and those of this process in the shard in hand.
        total: pairs of the set, or of the part.
        made: pairs that this process has made.
        seconds: since it began.
    """

    done: int
    total: int
    made: int
    seconds: float


@dataclass(frozen=True)
class Generated:
    """What a process has done.

    Attributes:
        made: pairs that it has put into the set.
        done, total: pairs of the set, or of the part, that are there, and that there are to be.
        seconds: it took.
        ended: "finished", or the name of the signal that ended it.
        again: shards that were begun more than once, because a worker was lost; of a Ray job.
    """

    made: int
    done: int
    total: int
    seconds: float
    ended: str
    again: int = 0


@torch.no_grad()
def generate(
    source: Source,
    pair_set: PairSet,
    folder: str | Path,
    *,
    batch_size: int = 16,
    part: tuple[int, int] = (0, 1),
    report: Callable[[Progress], None] | None = None,
) -> Generated:
    """Make all shards of a set that are not there yet, sharing the work with every process that does the same.

    Returns when every shard is there, be it made here or by another process; what a process that died had in hand is
    made by one of the others. SIGTERM and SIGINT end it after the shard in hand. A pair depends on the set and on its
    number, not on who makes it; with one batch size it is the same bit for bit, as no batch crosses the end of a shard.

    Args:
        source: whose ODE is solved.
        pair_set: `source.pair_set(...)`.
        folder: new, empty, or of this very set.
        batch_size: pairs solved at once.
        part: (i, n) only every n-th shard from the i-th on, i in 0 … n - 1: for processes that share no disk, or one
            without locks.
        report: called after every batch.

    Raises:
        PairSetError, FileExistsError: the folder holds another set, or something else.
        FloatingPointError: the ODE ran into numbers that are not finite.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    index, parts = part
    require("part", part, 0 <= index < parts, "(i, n) with 0 <= i < n")
    require("batch_size", batch_size, batch_size >= 1, "1 or more")
    agree(folder, pair_set)
    shards = range(index, pair_set.shards, parts)
    total = sum(len(pair_set.span(shard)) for shard in shards)
    start, made = time.perf_counter(), 0

    def done() -> int:
        return sum(len(pair_set.span(shard)) for shard in shards if shard_file(folder, shard).exists())

    def advance(before: int, in_hand: int) -> None:
        if report is not None:
            report(Progress(before + in_hand, total, made + in_hand, time.perf_counter() - start))

    with Interruption() as interruption:
        advance(done(), 0)
        missing = list(shards)
        while missing and not interruption.requested:
            idle = True
            for shard in missing:
                if interruption.requested:
                    break
                with claimed(folder, shard) as mine:
                    if mine:
                        idle, before = False, done()
                        make_shard(source, pair_set, folder, shard, batch_size, lambda n, b=before: advance(b, n))
                        made += len(pair_set.span(shard))
            missing = [shard for shard in missing if not shard_file(folder, shard).exists()]
            if missing and idle and not interruption.requested:
                advance(done(), 0)
                time.sleep(POLL_SECONDS)
    advance(done(), 0)
    ended = interruption.requested if missing else None
    return Generated(made, done(), total, time.perf_counter() - start, ended or "finished")


def make_shard(
    source: Source,
    pair_set: PairSet,
    folder: Path,
    shard: int,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Solve the pairs of a shard and write it; whoever calls has claimed it.

    advance: called after every batch with the pairs of the shard that are solved.
    """
    span = pair_set.span(shard)
    noise, lines = pair_set.noise_of(span), pair_set.prompts_of(span)
    conditions = source.conditions(lines)
    latents = []
    for first in range(0, len(span), batch_size):
        batch = slice(first, first + batch_size)
        latents.append(source.solve(pair_set, noise[batch], conditions[batch]).cpu())
        if advance is not None:
            advance(min(first + batch_size, len(span)))
    latent = torch.cat(latents)
    _check_finite(latent, span, pair_set)
    tensors = {"pair": torch.tensor(span), "prompt": lines, "latent": latent}
    if pair_set.noise == "stored":
        tensors["noise"] = noise
    if pair_set.text:
        parts = {field.name: getattr(conditions, field.name) for field in fields(conditions)}
        tensors |= {name: t.cpu() for name, t in parts.items() if t is not None}
    write_shard(folder, shard, tensors, metadata(pair_set, [source.prompts[line] for line in lines.tolist()]))


def metadata(pair_set: PairSet, prompts: list[str]) -> dict[str, str]:
    """What a shard says of itself: the facts of its set, each as JSON, and the prompts of its pairs in their order."""
    facts = {name: json.dumps(value) for name, value in asdict(pair_set).items()}
    return facts | {"prompts": json.dumps(prompts)}


def _check_finite(latent: torch.Tensor, span: range, pair_set: PairSet) -> None:
    finite = latent.flatten(1).isfinite().all(1)
    if not finite.all():
        pair = span[int((~finite).nonzero()[0])]
        raise FloatingPointError(
            f"pair {pair}: the {pair_set.solver} solver in {pair_set.dtype} gave a latent that is not finite; "
            "try float32 or bfloat16, less guidance or more steps"
        )
