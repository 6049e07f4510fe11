"""A cache gives what encoding gives, survives being killed, and refuses what it does not hold."""

import json
import shutil

import pytest
import torch
from fastdistill.training import Draws, Teacher
from fastdistill.training.images import (
    CachedImageData,
    CacheError,
    Framing,
    ImageData,
    ImageFolder,
    Images,
    TooManyUnreadable,
    UnreadableImage,
    cache_images,
)
from fastdistill.training.images import cache as cache_module
from fastdistill.training.world import World

from ..toys import tiny_pipeline
from .pictures import write_folder

FRAMING = Framing(32, 32, flip=True, buckets=True, multiple=8)
BROKEN = (2, 5)
pytestmark = pytest.mark.filterwarnings("ignore::fastdistill.training.images.UnreadableImage")


@pytest.fixture(scope="module")
def teacher():
    return Teacher(tiny_pipeline())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("images") / "pictures", 14, BROKEN)
    (folder / "003.txt").write_text("seven\nsome 7\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def cached(teacher, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "cache"
    build(teacher, pictures, folder)
    return folder


def build(teacher, pictures, folder, framing=FRAMING, max_unreadable=0.2, **options):
    options = {"shard_size": 3, "batch_size": 2} | options
    return cache_images(ImageFolder(pictures), framing, teacher, folder, max_unreadable=max_unreadable, **options)


def copy_of(cached, tmp_path):
    return shutil.copytree(cached, tmp_path / "copy")


def batch(data, number, **options):
    draws = Draws(0, number, batch_size=3, **options)
    return data.batch(number * draws.whole_batch, draws)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_cached_batch_is_the_encoded_one_with_broken_images_replaced_alike(teacher, pictures, cached):
    encoding = ImageData(Images(ImageFolder(pictures), FRAMING, max_unreadable=0.2), teacher)
    reading = CachedImageData(build(teacher, pictures, cached))
    alone = CachedImageData(build(teacher, pictures, cached), pixels=False)
    for number in range(12):
        expected, found, latents = (batch(data, number) for data in (encoding, reading, alone))
        assert torch.equal(found["image"], expected["image"])
        assert torch.equal(found["noise"], expected["noise"])
        torch.testing.assert_close(found["data"], expected["data"], rtol=0, atol=1e-5)
        torch.testing.assert_close(found["condition"].states, expected["condition"].states, rtol=0, atol=1e-5)
        torch.testing.assert_close(found["condition"].pooled, expected["condition"].pooled, rtol=0, atol=1e-5)
        assert found["condition"].time_ids is None
        assert "image" not in latents
        assert torch.equal(latents["data"], found["data"])
    assert reading.figures() == {"unreadable_images": len(BROKEN)}


def test_processes_share_cached_batches_too(teacher, pictures, cached):
    data = CachedImageData(build(teacher, pictures, cached), pixels=False)
    draws = Draws(0, 5, batch_size=6)
    whole = data.batch(30, draws)
    halves = [batch(data, 5, rank=rank, world=2) for rank in range(2)]
    assert torch.equal(torch.cat([half["data"] for half in halves]), whole["data"])
    assert torch.equal(torch.cat([half["condition"].states for half in halves]), whole["condition"].states)


def test_the_unreadable_ones_are_named_once_when_a_cache_is_made_or_opened(teacher, pictures, cached, tmp_path):
    with pytest.warns(UnreadableImage) as caught:
        build(teacher, pictures, cached)
    assert sorted(str(one.message).split(":")[0][-7:] for one in caught) == ["002.png", "005.png"]
    with pytest.warns(UnreadableImage) as caught:
        build(teacher, pictures, tmp_path / "new")
    assert sorted(str(one.message).split(":")[0][-7:] for one in caught) == ["002.png", "005.png"]
    with pytest.raises(TooManyUnreadable, match="2 of 14 images cannot be read; max_unreadable allows 1"):
        build(teacher, pictures, cached, max_unreadable=0.1)


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_cache_that_was_killed_after_any_file_is_completed_to_the_same_bytes(
    after, teacher, pictures, cached, tmp_path, monkeypatch
):
    written = []

    def killed(path, tensors, metadata):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(path)
        write(path, tensors, metadata)

    write = cache_module._write
    monkeypatch.setattr(cache_module, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        build(teacher, pictures, tmp_path / "cache")
    monkeypatch.setattr(cache_module, "_write", write)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    build(teacher, pictures, tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(cached)
    assert all((tmp_path / "cache" / name).stat().st_mtime_ns == time for name, time in before.items())


def test_a_cache_of_something_else_is_refused_with_the_difference(teacher, pictures, cached, tmp_path):
    with pytest.raises(CacheError, match=r"framing is \{.*'flip': True.*\} there and \{.*'flip': False.*\} here"):
        build(teacher, pictures, cached, Framing(32, 32, buckets=True, multiple=8))
    with pytest.raises(CacheError, match=r"images is .* there"):
        build(teacher, write_folder(tmp_path / "others", 14), cached)
    with pytest.raises(CacheError, match="dtype is float32 there and float16 here"):
        build(teacher, pictures, cached, dtype="float16")
    with pytest.raises(CacheError, match="holds something else"):
        build(teacher, pictures, pictures)
    with pytest.raises(ValueError, match="crop must be center"):
        build(teacher, pictures, tmp_path / "new", Framing(32, 32, crop="random"))
    assert not (tmp_path / "new").exists()


def test_another_autoencoder_is_noticed(teacher, pictures, cached):
    weight = next(teacher.pipeline.vae.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
    try:
        with pytest.raises(CacheError, match="autoencoder is"):
            build(teacher, pictures, cached)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_truncated_file_is_named_and_computed_anew_once_it_is_removed(teacher, pictures, cached, tmp_path):
    folder = copy_of(cached, tmp_path)
    file = sorted(folder.glob("latents-*"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CacheError, match=f"{file.name}: missing or damaged .* remove it"):
        build(teacher, pictures, folder)
    file.unlink()
    build(teacher, pictures, folder)
    assert contents(folder) == contents(cached)


def test_processes_share_the_files_of_a_cache(teacher, pictures, cached, tmp_path, monkeypatch):
    monkeypatch.setattr(World, "wait", lambda self: None)
    folder = copy_of(cached, tmp_path)
    files = [path for path in folder.glob("*.safetensors") if path.name != "index.safetensors"]
    for path in files:
        path.unlink()
    for rank in range(2):
        part = tmp_path / f"part-{rank}"
        shutil.copytree(folder, part)
        with pytest.raises(CacheError, match="missing"):  # the other process has not come that far
            build(teacher, pictures, part, world=World(rank, 2))
    parts = [contents(tmp_path / f"part-{rank}") for rank in range(2)]
    assert set(parts[0]) & set(parts[1]) == {"cache.json", "index.safetensors"}
    assert parts[0] | parts[1] == contents(cached)


def test_a_smaller_dtype_halves_the_latents_and_keeps_sizes_exact(teacher, pictures, cached, tmp_path):
    data = CachedImageData(build(teacher, pictures, tmp_path / "half", dtype="float16"), pixels=False)
    full = CachedImageData(build(teacher, pictures, cached), pixels=False)
    ours, theirs = batch(data, 1), batch(full, 1)
    assert ours["data"].dtype == torch.float32
    torch.testing.assert_close(ours["data"], theirs["data"], rtol=1e-3, atol=1e-3)
    assert torch.equal(ours["data"].half().float(), ours["data"])
    assert json.loads((tmp_path / "half" / "cache.json").read_text(encoding="utf-8"))["dtype"] == "float16"
