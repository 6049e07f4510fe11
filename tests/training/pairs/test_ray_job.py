"""A set that the workers of a Ray cluster make is the one of a single process, also when a worker is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fastdistill.training import Teacher
from fastdistill.training.cluster import Cluster
from fastdistill.training.pairs import PairSetError, Source, generate, ray_job, verify
from fastdistill.training.pairs.__main__ import app
from fastdistill.training.pairs.shards import is_claimed, shard_file
from typer.testing import CliRunner

from fastdistill.models.digits.folder import save_folder

from ..toys import tiny_pipeline
from .conftest import PROMPTS
from .test_sharing import assert_same_tensors

COUNT, SHARD_SIZE, STEPS, BATCH_SIZE = 8, 2, 50, 2


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return str(save_folder(tiny_pipeline(), tmp_path_factory.mktemp("models") / "tiny-teacher", "a card"))


@pytest.fixture(scope="module")
def described(teacher_folder):
    source = Source.of(Teacher(teacher_folder), PROMPTS)
    return source, source.pair_set(count=COUNT, shard_size=SHARD_SIZE, steps=STEPS, solver="euler")


def test_a_worker_that_is_killed_within_a_shard_leaves_the_set_of_one_process(described, teacher_folder, tmp_path):
    folder, prompts = tmp_path / "set", tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    asked = {"teacher": teacher_folder, "prompts": prompts, "out": folder, "solver": "euler", "steps": STEPS}
    asked |= {"count": COUNT, "shard-size": SHARD_SIZE, "batch-size": BATCH_SIZE, "ray-workers": 2}
    options = [f"--{name}={value}" for name, value in asked.items()]
    with subprocess.Popen(
        [sys.executable, "-m", "fastdistill.training.pairs", "generate", "--ray", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        os.kill(stopped_within_a_shard(folder, job), signal.SIGKILL)
        said = job.communicate(timeout=400)[0]
    assert job.returncode == 0, said
    assert f"{folder}: {COUNT} pairs, {COUNT} of them made here" in said
    assert "shards begun again because a worker was lost: 1" in said
    source, pair_set = described
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generate(source, pair_set, tmp_path / "alone", batch_size=BATCH_SIZE)
    torch.set_num_threads(threads)
    assert_same_tensors(folder, tmp_path / "alone")
    assert verify(folder) == []


def stopped_within_a_shard(folder, job):
    """The process of a worker that has claimed a shard and not written it: it stands still there."""
    while job.poll() is None:
        for shard in range(COUNT // SHARD_SIZE):
            pid = holder(folder / f".pairs-{shard:05d}.lock")
            if pid is not None:
                os.kill(pid, signal.SIGSTOP)
                if is_claimed(folder, shard) and not shard_file(folder, shard).exists():
                    return pid
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)
    return pytest.fail(f"ended before a shard was begun: {job.stdout.read()}")


def holder(lock):
    """The process that has locked the file, as the kernel tells."""
    try:
        inode = lock.stat().st_ino
    except FileNotFoundError:
        return None
    held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    pids = [int(words[4]) for words in held if words[1] == "FLOCK" and words[5].endswith(f":{inode}")]
    return pids[0] if pids else None


def test_a_whole_set_needs_no_cluster(described, teacher_folder, tmp_path, monkeypatch):
    source, pair_set = described
    generate(source, pair_set, tmp_path, batch_size=BATCH_SIZE)
    monkeypatch.setattr(Cluster, "run", lambda *_: pytest.fail("a cluster was asked for"))
    result = ray_job.generate_on_ray(teacher_folder, PROMPTS, pair_set, tmp_path)
    assert (result.made, result.done, result.ended) == (0, COUNT, "finished")


def worker(described, teacher_folder, folder):
    return ray_job._prepare(teacher_folder, PROMPTS, described[1], str(folder), "cpu", BATCH_SIZE)


def test_a_worker_refuses_another_teacher_and_a_folder_that_it_does_not_share(described, teacher_folder, tmp_path):
    with pytest.raises(PairSetError, match=r"no set of pairs .* needed a folder that all machines"):
        worker(described, teacher_folder, tmp_path)
    source, pair_set = described
    generate(source, pair_set, tmp_path / "set", batch_size=BATCH_SIZE)
    other = tiny_pipeline()
    with torch.no_grad():
        other.unet.conv_out.bias += 1
    save_folder(other, tmp_path / "other", "a card")
    with pytest.raises(PairSetError, match=r"is another teacher on .*: unet_sha256 differ"):
        worker(described, str(tmp_path / "other"), tmp_path / "set")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--ray", "--shard", "1/2"], "--shard 1/2: needed none with --ray"),
        (["--ray", "--device", "cuda:1"], "device must be cpu or cuda for a Ray job, which gives each worker its GPU"),
        (["--ray", "--ray-cpus", "0"], "cpus must be above 0; got 0"),
        (["--ray-workers", "2"], "--ray-workers: needed --ray too"),
        (["--shard", "rank"], "--shard rank: there is no RANK"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_written(
    given, message, teacher_folder, tmp_path, monkeypatch
):
    monkeypatch.delenv("RANK", raising=False)
    asked = ["generate", "--out", str(tmp_path / "set"), "--count", "4", "--teacher", teacher_folder, *given]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_without_ray_the_error_names_the_extra(teacher_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    asked = ["generate", "--out", str(tmp_path / "set"), "--count", "4", "--teacher", teacher_folder, "--ray"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2
    assert "pip install 'fastdistill[ray]'" in result.output
