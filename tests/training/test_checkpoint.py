"""Checkpoints: the same tree back, damage named, the one before it used, nothing lost."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from fastdistill.training import CheckpointError, checkpoint

from .processes import killed_at, run

STATE = {
    "student": {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7)},
    "student.optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "betas": (0.9, 0.999), "lr": [1e-4, None, True]},
    "counters": {"iteration": 12, "name": "dmd"},
}


LATER = {**STATE, "counters": {"iteration": 13, "name": "dmd"}}
LATER["student.optimizer"] = {**STATE["student.optimizer"], "state": {0: {"exp_avg": torch.full((3,), 2.0)}}}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_tree_of_tensors_and_scalars_comes_back_as_it_was(tmp_path):
    path = checkpoint.save(tmp_path, 100, STATE)
    assert path == tmp_path / "step-00000100"
    assert same(checkpoint.load(path), STATE)
    assert sorted(file.name for file in path.iterdir()) == [
        "state.json",
        "student.optimizer.safetensors",
        "student.safetensors",
    ]


def test_views_of_one_storage_and_channels_last_tensors_are_saved_by_value(tmp_path):
    both = torch.arange(8.0)
    images = torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last)
    state = {"part": {"a": both[:4], "b": both[4:], "again": both, "images": images}}
    assert same(checkpoint.load(checkpoint.save(tmp_path, 1, state)), state)


def test_the_newest_are_kept_and_the_best(tmp_path):
    for update in (1, 2, 3, 4, 5):
        checkpoint.save(tmp_path, update, STATE, keep=2, best=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{n:08d}" for n in (1, 4, 5)]
    assert checkpoint.load_newest(tmp_path)[0] == 5


def truncate(path):
    file = path / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    return "student.safetensors: .* bytes, .* were written"


def edit(path):
    file = path / "student.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return "student.safetensors: its content was changed"


def remove(path):
    (path / "student.safetensors").unlink()
    return "student.safetensors: is missing"


def edit_state(path):
    record = json.loads((path / "state.json").read_text())
    record["step"] = 1000
    (path / "state.json").write_text(json.dumps(record))
    return "state.json: it was changed after it was written"


def truncate_state(path):
    (path / "state.json").write_text((path / "state.json").read_text()[:-9])
    return "state.json: cannot be read"


def swap(path):
    older = path.with_name("step-00000001")
    for folder, content in ((path, older), (older, path)):
        (folder / "swapped").write_bytes((content / "student.optimizer.safetensors").read_bytes())
    os.replace(path / "swapped", path / "student.optimizer.safetensors")
    (older / "swapped").unlink()
    return "student.optimizer.safetensors: its content was changed"


def swap_states(path):
    shutil.copy(path.with_name("step-00000001") / "state.json", path / "state.json")
    return "state.json: it is of step 1, under another's name"


def make_unreadable(path):
    (path / "student.safetensors").unlink()
    (path / "student.safetensors").symlink_to("student.safetensors")  # reading it fails, whoever reads: ELOOP
    return "student.safetensors: cannot be read"


DAMAGES = [truncate, edit, remove, edit_state, truncate_state, swap, swap_states, make_unreadable]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_is_used(tmp_path, damage):
    checkpoint.save(tmp_path, 1, STATE)
    newest = checkpoint.save(tmp_path, 2, LATER)
    message = damage(newest)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(newest)
    with pytest.warns(UserWarning, match=message):
        update, state = checkpoint.load_newest(tmp_path)
    assert update == 1
    assert same(state, STATE)


def test_where_every_checkpoint_is_damaged_nothing_is_made_up(tmp_path):
    assert checkpoint.load_newest(tmp_path / "never") is None
    assert checkpoint.load_newest(tmp_path) is None
    truncate(checkpoint.save(tmp_path, 1, STATE))
    with pytest.warns(UserWarning, match="refused"), pytest.raises(CheckpointError, match="none of its 1 checkpoints"):
        checkpoint.load_newest(tmp_path)


def test_a_disk_that_is_full_half_way_loses_nothing_that_was_saved(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, STATE)
    written = []

    def full(tensors, file):
        written.append(file)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        file.write_bytes(b"half")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*what was saved before is still there"):
        checkpoint.save(tmp_path, 2, STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert same(checkpoint.load_newest(tmp_path)[1], STATE)


@pytest.mark.parametrize("bit", range(0, 8 * 120, 37))
def test_a_bit_that_flips_anywhere_is_found(tmp_path, bit):
    path = checkpoint.save(tmp_path, 1, STATE)
    for file in path.iterdir():
        content = bytearray(file.read_bytes())
        whole = bytes(content)
        content[bit // 8 % len(content)] ^= 1 << bit % 8
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=file.name):
            checkpoint.load(path)
        file.write_bytes(whole)
    assert same(checkpoint.load(path), STATE)


def save_and_die_at_every_call(folder):
    for call in range(1000):
        place = folder / f"{call:03d}"
        for step in (1, 2):
            checkpoint.save(place, step, STATE)
        if os.fork() == 0:
            with killed_at(call):
                checkpoint.save(place, 3, LATER, keep=1, best=1)
            os._exit(0)
        if os.wait()[1] == 0:
            return
    os._exit(1)


def test_a_kill_at_any_system_call_of_a_save_leaves_a_whole_checkpoint_and_nothing_that_stays(tmp_path):
    assert run(save_and_die_at_every_call, tmp_path) == 0
    found = []
    for folder in sorted(tmp_path.iterdir()):
        step, state = checkpoint.load_newest(folder)
        found.append(step)
        assert same(state, {2: STATE, 3: LATER}[step])
        assert same(checkpoint.load(folder / "step-00000001"), STATE)
        checkpoint.save(folder, 4, LATER, keep=1, best=1)
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000004"]
    assert found == sorted(found)
    assert min(found.count(2), found.count(3)) > 8


def test_every_file_is_on_the_disk_before_its_folder_gets_its_name_and_that_before_older_ones_go(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "dmd"
    done = []

    def traced(name, function, place):
        def call(*given, **options):
            done.append((name, place(given)))
            return function(*given, **options)

        monkeypatch.setattr(os, name, call)

    traced("fsync", os.fsync, lambda given: os.readlink(f"/proc/self/fd/{given[0]}"))
    traced("replace", os.replace, lambda given: str(given[1]))
    traced("rmdir", os.rmdir, lambda given: "older")
    checkpoint.save(folder, 1, STATE, keep=1)
    checkpoint.save(folder, 2, LATER, keep=1)
    assert done[:2] == [("fsync", str(tmp_path / "runs")), ("fsync", str(tmp_path))]
    second = done[done.index(("replace", str(folder / "step-00000001"))) + 2 :]
    renamed = second.index(("replace", str(folder / "step-00000002")))
    scratch = folder / ".step-00000002.partial"
    written = {scratch, *(scratch / path.name for path in (folder / "step-00000002").iterdir())}
    assert {Path(path) for _, path in second[:renamed]} == written
    assert second[renamed + 1 :] == [("fsync", str(folder)), ("rmdir", "older")]


def save_on_a_disk_of(folder, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    state = {**LATER, "student": {"weight": torch.zeros(500)}}
    try:
        checkpoint.save(folder, 2, state)
    except CheckpointError as error:
        (folder / "said").symlink_to(str(error)[:200])


@pytest.mark.parametrize("size", [0, 100, 1000, 2000])
def test_a_file_that_the_system_writes_in_part_only_loses_nothing(tmp_path, size):
    checkpoint.save(tmp_path, 1, STATE)
    assert run(save_on_a_disk_of, tmp_path, size) == 0
    assert "step-00000002: cannot be written" in os.readlink(tmp_path / "said")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-00000001"]
    assert same(checkpoint.load_newest(tmp_path)[1], STATE)


def test_the_same_step_again_is_kept_if_it_is_whole_and_written_anew_if_not(tmp_path):
    path = checkpoint.save(tmp_path, 1, STATE)
    written = (path / "state.json").stat().st_mtime_ns
    checkpoint.save(tmp_path, 1, STATE)
    assert (path / "state.json").stat().st_mtime_ns == written
    truncate(path)
    assert same(checkpoint.load(checkpoint.save(tmp_path, 1, STATE)), STATE)


def test_what_is_neither_tensor_nor_json_is_named_by_its_place(tmp_path):
    with pytest.raises(TypeError, match=r"part\.1: a set cannot be kept"):
        checkpoint.save(tmp_path, 1, {"part": [1, {2}]})
    assert list(tmp_path.iterdir()) == []
