"""The figures of a student do not depend on how many processes made its images."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdistill.training.cluster import Cluster
from fastdistill.training.evaluation import __main__ as command
from fastdistill.training.evaluation import evaluate, evaluate_on_ray
from fastdistill.training.evaluation import figures as evaluation
from fastdistill.training.evaluation.figures import _batches, _ready, gathered
from fastdistill.training.validation import ValidationConfig
from fastdistill.training.world import World, world_of_environment
from typer.testing import CliRunner

from fastdistill.metrics import FrechetStatistics
from fastdistill.models.digits.folder import save_folder
from fastdistill.models.digits.metrics import score

from ..toys import tiny_pipeline

ROOT = Path(__file__).resolve().parents[3]
NAME = "tests.training.evaluation.test_evaluation"
PROMPTS = ("a handwritten seven", "two", "digit 3")


def thumbnails(images):
    """A feature function: (B, 3, H, W) to (B, 12)."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def configurations(reference):
    """Of each kind; the last one has one batch, so that a second process has none."""
    real = {"kind": "reference", "reference": str(reference), "features": f"{NAME}:thumbnails"}
    return [
        ValidationConfig("digits", count=30, batch_size=4, seed=2),
        ValidationConfig(count=13, batch_size=3, **real),
        ValidationConfig(count=13, batch_size=20, **real),
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_folder(tiny_pipeline(), tmp_path_factory.mktemp("models") / "tiny", "a card")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "real.npz"
    FrechetStatistics().update(torch.randn(20, 12, generator=torch.Generator().manual_seed(1))).save(path)
    return path


@pytest.fixture(autouse=True)
def _one_thread_as_the_processes_have():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(model, reference):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield [evaluate(model, PROMPTS, config, steps=2) for config in configurations(reference)]
    torch.set_num_threads(threads)


def test_two_processes_have_the_figures_of_one(alone, model, reference, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", NAME, str(model), str(reference), str(tmp_path)],
            env={**environment, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    assert [process.wait(400) for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["figures"] == alone
    assert second["figures"] == [None] * 3
    assert [first["images"], second["images"]] == [[16, 7, 13], [14, 6, 0]]  # each made its share, and no more


def test_the_workers_of_a_cluster_have_the_figures_of_one_process(alone, model, reference, monkeypatch):
    def run(cluster, prepare, arguments, items, interruption):
        work = prepare(**arguments)
        for item in reversed(items):
            yield {"item": np.asarray(item), **work(item)}

    monkeypatch.setattr(Cluster, "run", run)
    monkeypatch.setattr(evaluation, "ITEMS", 3)
    found = [evaluate_on_ray(model, PROMPTS, config, steps=2) for config in configurations(reference)]
    assert found == alone


def test_the_figures_are_those_of_all_images_at_once(alone, model, reference):
    digits, real, _ = configurations(reference)
    pipeline, texts = _ready(model, PROMPTS, digits, 2, "cpu")
    images = torch.cat([batch for _, batch in _batches(pipeline, texts, digits, 2, 1.0, range(99))])
    scores = score(images, torch.arange(10).repeat(3))
    assert alone[0] == {"fd": scores.fd, "accuracy": scores.accuracy, "diversity": scores.diversity}
    pipeline, texts = _ready(model, PROMPTS, real, 2, "cpu")
    images = torch.cat([batch for _, batch in _batches(pipeline, texts, real, 2, 1.0, range(99))])
    distance = FrechetStatistics().update(thumbnails(images)).distance(FrechetStatistics.load(reference))
    assert alone[1]["fd"] == pytest.approx(distance, rel=1e-9)


def test_one_process_gathers_its_own_batches_in_their_order():
    batches = {1: torch.ones(2, 3), 0: torch.zeros(4, 3)}
    assert [len(batch) for batch in gathered(batches, [4, 2], World())] == [4, 2]


def run(*arguments):
    return CliRunner().invoke(command.app, [str(argument) for argument in arguments])


def test_the_command_prints_the_figures_as_lines_and_as_json(model):
    asked = [model, "--count", 20, "--seed", 3, "--steps", 2]
    figures = evaluate(model, (), ValidationConfig("digits", count=20, seed=3), steps=2)
    told = json.loads(run(*asked, "--json").stdout)
    assert told["figures"] == figures
    assert {name: told[name] for name in ("count", "seed", "steps")} == {"count": 20, "seed": 3, "steps": 2}
    assert run(*asked).stdout.splitlines() == [f"{name:20}{value:.4f}" for name, value in figures.items()]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--count", "25"], "count must be a multiple of 10, 20 or more; got 25"),
        (["--features", "a:b"], "--features a:b: needed --reference too"),
        (["--reference", "nowhere.npz"], "there is no such file"),
        (["--ray-cpus", "2"], "--ray-cpus: needed --ray too"),
        (["--ray", "--device", "cuda:1"], "device must be cpu or cuda for a Ray job"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(given, message, model):
    result = run(model, *given)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("error:") == 1


def counted(batches, counts):
    """`sample_batches` that notes how many images it has made."""

    def call(*arguments, **options):
        counts.append(0)
        for number, images in batches(*arguments, **options):
            counts[-1] += len(images)
            yield number, images

    return call


if __name__ == "__main__":
    folder, real, out = map(Path, sys.argv[1:])
    images: list[int] = []
    evaluation.sample_batches = counted(evaluation.sample_batches, images)
    with world_of_environment("cpu") as world:
        found = [evaluate(folder, PROMPTS, each, steps=2, world=world) for each in configurations(real)]
        (out / f"{world.rank}.json").write_text(json.dumps({"figures": found, "images": images}))
