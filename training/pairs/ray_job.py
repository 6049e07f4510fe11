"""Making a set of pairs on the machines of a Ray cluster, which share the set's folder."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..cluster import Cluster, Work
from ..config import require
from ..interruption import Interruption
from ..ray_options import check_device
from ..teacher import Teacher
from .generation import POLL_SECONDS, Generated, Progress, make_shard
from .pair_set import PairSet, PairSetError, agree, read_set
from .shards import claimed, shard_file
from .source import Source


def generate_on_ray(
    teacher: str,
    prompts: Sequence[str],
    pair_set: PairSet,
    folder: str | Path,
    *,
    cluster: Cluster | None = None,
    device: str = "cpu",
    batch_size: int = 16,
    report: Callable[[Progress], None] | None = None,
) -> Generated:
    """`generate` as a Ray Data job: its items are the shards that are missing, and every worker loads the teacher once.

    The shards are those that `generate` makes. A shard whose worker is lost is made again by another one. SIGTERM and
    SIGINT end the job after the shards in hand; a second one at once. Other processes may work on the folder meanwhile.

    Args:
        teacher: bundled name or pipeline folder, that each machine can read.
        prompts, pair_set: of `Source.of(...)` with this teacher.
        folder: new, empty, or of this very set, on a filesystem that all machines of the cluster share.
        cluster: where, and what each worker takes of it.
        device: of every worker: cpu, or cuda for the GPU that Ray gives it.
        batch_size: pairs solved at once.
        report: called whenever a shard is done.

    Raises:
        PairSetError, FileExistsError: the folder holds another set, or something else; or a machine of the cluster has
            another teacher under this name, or does not see the folder.
        ImportError, ConnectionError, ValueError, ClusterError, FloatingPointError, OSError: as `Cluster.run` and
            `generate`.
    """
    folder = Path(folder).resolve()
    require("batch_size", batch_size, batch_size >= 1, "1 or more")
    check_device(device)
    agree(folder, pair_set)
    missing = [shard for shard in range(pair_set.shards) if not shard_file(folder, shard).exists()]
    done = pair_set.count - sum(len(pair_set.span(shard)) for shard in missing)
    start, made, again = time.perf_counter(), 0, 0
    path = str(Path(teacher).resolve()) if Path(teacher).is_dir() else teacher
    arguments = {
        "teacher": path,
        "prompts": tuple(prompts),
        "pair_set": pair_set,
        "folder": str(folder),
        "device": device,
        "batch_size": batch_size,
    }

    def seconds() -> float:
        return time.perf_counter() - start

    with Interruption() as interruption:
        if report is not None:
            report(Progress(done, pair_set.count, made, seconds()))
        if missing:
            for row in (cluster or Cluster()).run(_prepare, arguments, missing, interruption):
                made, again = made + int(row["made"]), again + int(row["retries"] > 0)
                done += len(pair_set.span(int(row["item"])))
                if report is not None:
                    report(Progress(done, pair_set.count, made, seconds()))
    ended = interruption.requested if done < pair_set.count else None
    return Generated(made, done, pair_set.count, seconds(), ended or "finished", again)


def _prepare(
    teacher: str, prompts: tuple[str, ...], pair_set: PairSet, folder: str, device: str, batch_size: int
) -> Work:
    """A worker."""
    where = Path(folder)
    try:
        read_set(where)
    except PairSetError as error:
        raise PairSetError(
            f"{error} as {socket.gethostname()} sees it; needed a folder that all machines of the cluster share"
        ) from error
    source = Source.of(Teacher(teacher, device), prompts, getattr(torch, pair_set.dtype))
    other = source.differences(pair_set)
    if other:
        raise PairSetError(f"{teacher} is another teacher on {socket.gethostname()}: {', '.join(other)} differ")

    @torch.no_grad()
    def work(shard: int) -> dict[str, int]:
        while not shard_file(where, shard).exists():
            with claimed(where, shard) as mine:
                if mine:
                    make_shard(source, pair_set, where, shard, batch_size)
                    return {"made": len(pair_set.span(shard))}
            time.sleep(POLL_SECONDS)  # a process outside the job is making it
        return {"made": 0}

    return work
