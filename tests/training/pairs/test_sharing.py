"""A set is the same whoever makes it, and however often they are killed: no pair twice, none missing."""

import random
import signal

import pytest
import torch
from fastdistill.training.pairs import generate, load_pairs, verify
from fastdistill.training.pairs.generation import Progress
from safetensors.torch import load_file

from ..processes import CONTEXT
from .workers import BATCH_SIZE, COUNT, described, killed_after, one_of_several


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "whole"
    result = generate(source, described(source), folder, batch_size=BATCH_SIZE)
    assert (result.made, result.done, result.total, result.ended) == (COUNT, COUNT, COUNT, "finished")
    return folder


def assert_same_tensors(folder, expected):
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names  # nothing is left lying about either
    for name in names:
        if name.endswith(".safetensors"):
            found, wanted = load_file(folder / name), load_file(expected / name)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def assert_same_set(folder, expected):
    assert_same_tensors(folder, expected)
    assert verify(folder) == []
    stored = torch.cat([load_file(path)["pair"] for path in sorted(folder.glob("*.safetensors"))])
    assert stored.tolist() == list(range(COUNT))


def test_a_run_that_is_killed_again_and_again_ends_in_the_set_of_one_that_was_not(uninterrupted, tmp_path):
    moments, kills = random.Random(0), 0
    while True:
        process = CONTEXT.Process(target=killed_after, args=(moments.randint(1, 16), tmp_path / "set"))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 3
    assert_same_set(tmp_path / "set", uninterrupted)


@pytest.mark.parametrize("killed", [0, 1])
def test_three_processes_share_one_set_and_do_the_work_of_one_that_dies(killed, uninterrupted, tmp_path):
    made, meeting = CONTEXT.Array("i", 3), CONTEXT.Barrier(3)
    processes = [
        CONTEXT.Process(target=one_of_several, args=(place, meeting, tmp_path / "set", made, place < killed))
        for place in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * killed + [0] * (3 - killed)
    assert sum(made) == COUNT  # nobody made a shard that another made too
    assert all(made[killed:])
    assert_same_set(tmp_path / "set", uninterrupted)


def test_parts_make_the_set_together_without_speaking_to_each_other(source, uninterrupted, tmp_path):
    made = [generate(source, described(source), tmp_path / "set", batch_size=2, part=(i, 3)).made for i in (2, 0, 1)]
    assert sum(made) == COUNT
    assert_same_set(tmp_path / "set", uninterrupted)


def test_the_pairs_do_not_depend_on_shards_and_batches_save_for_rounding(source, uninterrupted, tmp_path):
    other = source.pair_set(count=COUNT, shard_size=7, steps=1, solver="euler", seed=3)
    generate(source, other, tmp_path / "set", batch_size=5)
    expected, found = load_pairs(uninterrupted), load_pairs(tmp_path / "set")
    assert torch.equal(found.noise[:], expected.noise[:])
    assert torch.equal(found.condition, expected.condition)
    torch.testing.assert_close(found.sample[:], expected.sample[:])


def test_progress_counts_every_pair_once_and_ends_with_all(source, tmp_path):
    reports: list[Progress] = []
    generate(source, described(source), tmp_path / "set", batch_size=2, report=reports.append)
    done = [report.done for report in reports]
    assert done[0] == 0
    assert done[-1] == COUNT
    assert done == sorted(done)
    assert {report.total for report in reports} == {COUNT}


def test_sigterm_ends_a_run_after_the_shard_in_hand(source, uninterrupted, tmp_path):
    def terminate(progress):
        if progress.made == 2:  # half of the first shard
            signal.raise_signal(signal.SIGTERM)

    folder = tmp_path / "set"
    first = generate(source, described(source), folder, batch_size=2, report=terminate)
    assert (first.made, first.ended) == (4, "SIGTERM")
    second = generate(source, described(source), folder, batch_size=2)
    assert (second.made, second.done, second.ended) == (COUNT - 4, COUNT, "finished")
    assert_same_set(folder, uninterrupted)
