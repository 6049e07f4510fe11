"""A Ray cluster as a place for work that falls into items: a Ray Data job whose workers may be lost.

Ray is an extra. A worker builds what it needs once, be it a teacher, and does one item after the other.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .config import require
from .interruption import Interruption

Work = Callable[[int], Mapping[str, Any]]
"""From an item to what comes of it: numbers and arrays by name."""

POLL_SECONDS = 0.2  # how often the job looks whether it is to end
LOCAL_STORE_BYTES = 256 * 2**20  # of Ray's object store, by which results of a local cluster travel


class ClusterError(RuntimeError):
    """A job that lost more workers than it may, or that Ray itself could not go on with."""


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what each worker takes of it.

    Attributes:
        address: "local" starts one of this machine alone, for as long as the job takes; "auto" (the one that this
            machine belongs to) or HOST:PORT is one that runs.
        workers: at most so many at once; None is as many as there is room for.
        cpus, gpus: of each.
        retries: how often an item is begun again whose worker was lost, before the job fails.
    """

    address: str = "local"
    workers: int | None = None
    cpus: float = 1
    gpus: float = 0
    retries: int = 10

    def __post_init__(self) -> None:
        require("workers", self.workers, self.workers is None or self.workers >= 1, "1 or more")
        require("cpus", self.cpus, self.cpus > 0, "above 0")
        require("gpus", self.gpus, self.gpus >= 0, "0 or more")
        require("retries", self.retries, self.retries >= 0, "0 or more")

    def run(
        self,
        prepare: Callable[..., Work],
        arguments: Mapping[str, Any],
        items: Sequence[int],
        interruption: Interruption,
    ) -> Iterator[dict[str, Any]]:
        """What comes of each item, in the order in which they are done, with the item itself as "item", and as
        "retries" how often it was begun before, by workers that were lost.

        An item whose worker is lost, with its process or with its machine, is begun again by another one: work must
        bear being done twice. Once `interruption` is requested, items that no worker has begun are left out.

        Args:
            prepare: called once in each worker, `prepare(**arguments)`. A function of a module that all machines have.
            arguments: plain data.
            items: what there is to do.

        Raises:
            ImportError: Ray is not installed.
            ConnectionError: there is no cluster at `address`.
            ValueError: it has no room for a worker.
            ClusterError: an item's worker was lost more than `retries` times.
            Exception: whatever the work raised.
        """
        with _connected(self) as ray:
            size = min(self._size(ray), len(items))
            ledger = _ledger(ray, self.retries)
            worker = {"prepare": prepare, "arguments": dict(arguments), "ledger": ledger}
            try:
                for row in _polled(_dataset(self, size, worker, items)):
                    if interruption.requested:
                        ledger.end.remote()
                    if row is None or row["retries"] < 0:
                        continue
                    if "error" in row:
                        raise _unpacked(row["error"])
                    yield row
            finally:
                ledger.end.remote()  # a cluster that was there before goes on otherwise

    def _size(self, ray: ModuleType) -> int:
        """Of the pool."""
        there = ray.cluster_resources()
        room = [int(there.get(name, 0) / each) for name, each in (("CPU", self.cpus), ("GPU", self.gpus)) if each]
        if min(room) < 1:
            raise ValueError(
                f"the cluster at {self.address} has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs; a "
                f"worker needs {self.cpus:g} and {self.gpus:g}"
            )
        return min(room) if self.workers is None else self.workers


class _Ledger:
    """An actor that every worker asks before it begins an item."""

    def __init__(self, retries: int) -> None:
        self.retries, self.begun, self.ending = retries, {}, False

    def end(self) -> None:
        self.ending = True

    def begin(self, item: int) -> int:
        """How often the item was begun before; -1 where it is not to be begun, as the job ends."""
        if self.ending:
            return -1
        before = self.begun.get(item, 0)
        if before > self.retries:
            raise ClusterError(f"item {item} has lost {before} workers; it may lose {self.retries}")
        self.begun[item] = before + 1
        return before


def _ledger(ray: ModuleType, retries: int) -> Any:
    """On this machine, whose loss would end the job anyway."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(**options)(_Ledger).remote(retries)


class _Worker:
    """Prepares itself with the first item: an error while it is made would be a lost worker."""

    def __init__(self, prepare: Callable[..., Work], arguments: Mapping[str, Any], ledger: Any) -> None:
        self.prepare, self.arguments, self.ledger = prepare, arguments, ledger
        self.work: Work | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import ray

        item, retries = int(batch["item"][0]), 0
        try:
            retries = ray.get(self.ledger.begin.remote(item))
            found = {} if retries < 0 else self._done(item)
        except Exception as error:
            found = {"error": _packed(error)}
        return {name: np.asarray(value)[None] for name, value in {"item": item, "retries": retries, **found}.items()}

    def _done(self, item: int) -> Mapping[str, Any]:
        if self.work is None:
            self.work = self.prepare(**self.arguments)
        return self.work(item)


def _packed(error: Exception) -> np.ndarray:
    """An error as a row can carry it: Ray Data itself tells of layers of its own around it, in which it is lost."""
    from ray import cloudpickle

    error = getattr(error, "cause", error)  # of Ray's own call
    where = "".join(traceback.format_exception(error))
    return np.frombuffer(cloudpickle.dumps((error, where)), dtype=np.uint8)


def _unpacked(packed: np.ndarray) -> Exception:
    from ray import cloudpickle

    error, where = cloudpickle.loads(np.asarray(packed, dtype=np.uint8).tobytes())
    error.__cause__ = RuntimeError(f"in a worker:\n{where}")
    return error


def _dataset(cluster: Cluster, size: int, worker: dict[str, Any], items: Sequence[int]) -> Any:
    """Of the rows that workers, made of these arguments, make of the items."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised
    # Ray Data restarts a worker that is lost, and its item, without end. At least one worker, not `size`: those of a
    # lost machine wait for room, which others that are idle then give.
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=size, initial_size=size, max_tasks_in_flight_per_actor=1)
    # A block for each item, so that each is begun again alone.
    return ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items)).map_batches(
        _Worker,
        batch_size=1,
        compute=pool,
        num_cpus=cluster.cpus,
        num_gpus=cluster.gpus,
        fn_constructor_kwargs=worker,
    )


def _polled(dataset) -> Iterator[dict[str, Any] | None]:
    """The rows of a dataset, and None whenever there was none for a while: signals are looked after in between."""
    rows: queue.Queue = queue.Queue()
    end = object()

    def consume() -> None:
        try:
            for row in dataset.iter_rows():
                rows.put(row)
            rows.put(end)
        except Exception as error:
            rows.put(error)

    threading.Thread(target=consume, daemon=True).start()
    while True:
        try:
            row = rows.get(timeout=POLL_SECONDS)
        except queue.Empty:
            yield None
            continue
        if row is end:
            return
        if isinstance(row, Exception):
            raise ClusterError(f"the Ray job failed: {str(row).splitlines()[0]}") from row
        yield row


def import_ray() -> ModuleType:
    """Ray with its Data.

    Raises:
        ImportError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else this process writes the log of Ray's core to stderr
    # A job that is interrupted leaves a thread that waits for rows: it would connect again.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"a Ray job needs ray[data] ({error}): pip install 'fastdistill[ray]'") from error
    return ray


@contextmanager
def _connected(cluster: Cluster) -> Iterator[ModuleType]:
    """Ray, connected; a connection that was there before is used and left."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"address": cluster.address, "log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address == "local":
        cpus = max(os.cpu_count() or 1, int(np.ceil((cluster.workers or 1) * cluster.cpus)))
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": LOCAL_STORE_BYTES}
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)  # Ray has put its own there
        yield ray
    finally:
        ray.shutdown()
