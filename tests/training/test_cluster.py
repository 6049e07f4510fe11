"""Work on a Ray cluster: what comes of it, what is left out, and what is told when it fails."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fastdistill.training.cluster import Cluster
from fastdistill.training.interruption import Interruption

ROOT = Path(__file__).resolve().parents[2]


def prepare(factor):
    """Each item as an array of its own length; 90 is an error, 91 kills its worker."""

    def work(item):
        if item == 90:
            raise FloatingPointError("pair 90: not finite")
        if item == 91:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"array": np.full((item, 2), factor * item, dtype=np.float64)}

    return work


def results():
    """All that is asked of one cluster, for it to be started once."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    handler = signal.getsignal(signal.SIGTERM)
    one = Cluster(workers=1, retries=1)

    def items(cluster, *given, ends=False):
        interruption = Interruption()
        found = []
        for row in cluster.run(prepare, {"factor": 0.5}, given, interruption):
            found.append({name: np.asarray(value).tolist() for name, value in row.items()})
            interruption.requested = "SIGTERM" if ends else None
        return found

    def error(cluster, *given):
        try:
            return items(cluster, *given)
        except Exception as raised:
            return [type(raised).__name__, str(raised)]

    return {
        "done": sorted(items(one, 1, 2, 3), key=lambda row: row["item"]),
        "left out": items(one, *range(1, 30), ends=True),
        "failed": error(one, 90),
        "lost": error(one, 1, 91),
        "no room": error(Cluster(cpus=3), 1),
        "still there": ray.is_initialized() and signal.getsignal(signal.SIGTERM) is handler,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Ray and a test process should not share signals, threads and forks."""
    told = tmp_path_factory.mktemp("cluster") / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.test_cluster", str(told)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(told.read_text())


def test_what_comes_of_each_item_arrives_with_it(found):
    assert found["done"] == [{"item": item, "retries": 0, "array": [[item / 2, item / 2]] * item} for item in (1, 2, 3)]


def test_items_that_nobody_has_begun_when_the_job_is_to_end_are_left_out(found):
    assert 1 <= len(found["left out"]) < 29


def test_an_error_of_the_work_is_raised_as_what_it_was(found):
    assert found["failed"] == ["FloatingPointError", "pair 90: not finite"]


def test_an_item_that_loses_its_worker_every_time_ends_the_job(found):
    assert found["lost"] == ["ClusterError", "item 91 has lost 2 workers; it may lose 1"]


def test_a_cluster_without_room_for_a_worker_is_refused_with_what_it_has(found):
    assert found["no room"][0] == "ValueError"
    assert found["no room"][1].endswith("has 2 CPUs and 0 GPUs; a worker needs 3 and 0")


def test_a_connection_that_was_there_before_is_left(found):
    assert found["still there"]


@pytest.mark.parametrize("given", [{"workers": 0}, {"cpus": 0}, {"gpus": -1}, {"retries": -1}])
def test_a_cluster_that_cannot_be_is_refused_by_name(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        Cluster(**given)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(results()))
