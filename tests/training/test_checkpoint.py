"""Checkpoints: the same tree back, damage named, the one before it used, nothing lost."""

import contextlib
import json
import os

import pytest
import torch
from fastdistill.training import CheckpointError, checkpoint

STATE = {
    "student": {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7)},
    "student.optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "betas": (0.9, 0.999), "lr": [1e-4, None, True]},
    "counters": {"iteration": 12, "name": "dmd"},
}


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


@pytest.mark.parametrize("damage", [truncate, edit, remove, edit_state, truncate_state])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_is_used(tmp_path, damage):
    checkpoint.save(tmp_path, 1, STATE)
    newest = checkpoint.save(tmp_path, 2, STATE)
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


@pytest.mark.parametrize("call", range(12))
def test_a_kill_at_any_system_call_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, call):
    checkpoint.save(tmp_path, 1, STATE)
    calls = []

    class Killed(BaseException):
        pass

    def counted(function):
        def run(*args, **kwargs):
            calls.append(function)
            if len(calls) == call + 1:
                raise Killed
            return function(*args, **kwargs)

        return run

    for name in ("open", "fsync", "replace"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    later = {**STATE, "counters": {"iteration": 13}}
    with contextlib.suppress(Killed):
        checkpoint.save(tmp_path, 2, later, keep=1)
    monkeypatch.undo()
    update, state = checkpoint.load_newest(tmp_path)
    assert same(state, STATE if update == 1 else later)
    checkpoint.save(tmp_path, 3, later, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


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
