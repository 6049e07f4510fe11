"""Processes that share every batch make the run of one process with the whole batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastdistill.training import DMD, DMDConfig, PromptData, Trainer
from fastdistill.training.config import role_configs
from fastdistill.training.settings import changed
from fastdistill.training.world import World, world_of_environment
from safetensors.torch import load_file, save_file

from .toys import CONDITIONS, gaussian_teacher

ROOT = Path(__file__).resolve().parents[2]


def train(batch_size, world, folder=None, skip_on=None):
    """Six updates of the Gaussian student; `skip_on`: the rank whose second loss is infinite."""
    config = changed(
        DMDConfig(critic_ratio=2, regression_weight=0),
        trainer={"updates": 6, "batch_size": batch_size, "accumulation": 2, "report_every": 1},
        student={"warm_up": 0, "learning_rate": 0.01},
    )
    teacher, schedule = gaussian_teacher()
    method = DMD(teacher, schedule, "sample", config)
    if skip_on == world.rank:
        spoil(method)
    trainer = Trainer(
        method, PromptData(CONDITIONS, (2,)), config.trainer, role_configs(config), folder=folder, world=world
    )
    run = trainer.run()
    tensors = {f"student.{name}": p.detach() for name, p in run.student.named_parameters()}
    tensors |= {f"fake_score.{name}": p.detach() for name, p in method.fake_score.named_parameters()}
    return tensors | {"updates": torch.tensor([run.updates["student"], run.updates["fake_score"]])}


def spoil(method):
    calls = iter(range(1000))
    whole = method.losses

    def losses(role, step):
        found = whole(role, step)
        if role == "student" and next(calls) == 4:  # after the contract check's two
            found.terms["dmd"] = found.terms["dmd"] * torch.inf
        return found

    method.losses = losses


def processes(tmp_path, *arguments):
    """Two of them, connected as torchrun connects them; what each one ended with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.test_world", str(tmp_path), *arguments],
            env={**environment, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    assert [process.wait(120) for process in started] == [0, 0]
    return [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    first, second = processes(tmp_path)
    whole = train(16, World())
    for name, value in whole.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000012"]


def test_an_update_that_one_process_refuses_is_left_out_by_all(tmp_path):
    first, second = processes(tmp_path, "1")
    assert first["updates"].tolist() == second["updates"].tolist() == [5, 12]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with world_of_environment() as world:
        assert (world.rank, world.size, world.is_first) == (0, 1, True)
        assert world.any(True)
        tensor = torch.ones(2)
        world.average([tensor])
        assert torch.equal(tensor, torch.ones(2))


@pytest.fixture(autouse=True)
def _one_thread_as_the_processes_have():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


if __name__ == "__main__":
    folder, *skip = sys.argv[1:]
    with world_of_environment("cpu") as this:
        ended = train(8, this, Path(folder) / "checkpoints", skip_on=int(skip[0]) if skip else None)
        save_file({name: value.contiguous() for name, value in ended.items()}, f"{folder}/{this.rank}.safetensors")
