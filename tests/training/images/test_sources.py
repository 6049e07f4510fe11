"""Folders, datasets and tar files give the images and captions that are in their files, or say what is missing."""

import json

import datasets
import numpy as np
import pytest
from fastdistill.training.images import HuggingFaceDataset, ImageFolder, SourceError, TarFiles
from fastdistill.training.images.framing import open_image

from .pictures import caption, encoded, picture, write_folder, write_tar

COUNT = 7


def as_dataset(numbers=range(COUNT), text=caption):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": encoded(n), "path": None} for n in numbers], "text": [text(n) for n in numbers]}
    return datasets.Dataset.from_dict(rows, features=features)


def metadata_folder(tmp_path):
    folder = write_folder(tmp_path / "listed", COUNT)
    lines = [json.dumps({"file_name": f"{n:03d}.png", "text": caption(n)}) for n in range(COUNT)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for n in range(COUNT):
        (folder / f"{n:03d}.txt").unlink()
    return ImageFolder(folder)


def saved_dataset(tmp_path):
    as_dataset().save_to_disk(tmp_path / "saved")
    return HuggingFaceDataset(tmp_path / "saved")


def split_dataset(tmp_path):
    datasets.DatasetDict({"train": as_dataset(), "test": as_dataset([3])}).save_to_disk(tmp_path / "split")
    return HuggingFaceDataset(tmp_path / "split")


def imagefolder_dataset(tmp_path):
    metadata_folder(tmp_path)
    return HuggingFaceDataset(tmp_path / "listed")


def tars(tmp_path, captions="txt", pattern="{000..001}.tar", **options):
    tmp_path.mkdir(exist_ok=True)
    write_tar(tmp_path / "000.tar", range(4), captions)
    write_tar(tmp_path / "001.tar", range(4, COUNT), captions)
    return TarFiles(f"{tmp_path}/{pattern}", **options)


SOURCES = {
    "folder": lambda path: ImageFolder(write_folder(path / "plain", COUNT)),
    "metadata": metadata_folder,
    "dataset": saved_dataset,
    "split": split_dataset,
    "imagefolder": imagefolder_dataset,
    "tar": tars,
    "tar-glob": lambda path: tars(path, pattern="*.tar"),
    "tar-json": lambda path: tars(path, "json", caption="json.caption"),
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_images_and_captions_of_its_files_by_number(kind, tmp_path):
    source = SOURCES[kind](tmp_path)
    assert len(source) == COUNT
    assert len({source.name(n) for n in range(COUNT)}) == COUNT
    for n in (COUNT - 1, 0, 3, 0):
        np.testing.assert_array_equal(np.array(open_image(source.image(n))), np.array(picture(n)))
        assert source.captions(n) == (caption(n),)


@pytest.mark.parametrize("kind", ["folder", "metadata", "dataset", "tar"])
def test_the_digest_tells_one_set_of_images_from_another(kind, tmp_path):
    source, again = SOURCES[kind](tmp_path / "a"), None
    again = SOURCES[kind](tmp_path / "b")
    assert source.digest() == again.digest()
    less = ImageFolder(write_folder(tmp_path / "less", COUNT - 1))
    assert less.digest() != source.digest()


def test_lines_of_a_text_file_and_lists_in_metadata_are_several_captions(tmp_path):
    folder = write_folder(tmp_path / "lines", 2)
    (folder / "000.txt").write_text("a seven\n\n  seven \n", encoding="utf-8")
    (folder / "001.txt").write_text("", encoding="utf-8")
    source = ImageFolder(folder)
    assert source.captions(0) == ("a seven", "seven")
    assert source.captions(1) == ("",)
    lines = [{"file_name": "000.png", "alt": ["one", "1"]}, {"file_name": "001.png", "alt": "two"}]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    listed = ImageFolder(folder, caption="alt")
    assert [listed.captions(n) for n in range(2)] == [("one", "1"), ("two",)]


def test_a_folder_says_which_images_have_no_caption(tmp_path):
    folder = write_folder(tmp_path / "some", 3)
    (folder / "001.txt").unlink()
    (folder / "._002.png").write_bytes(b"of another program")
    with pytest.raises(SourceError, match=r"1 image without caption: .*001\.png; needed a \.txt"):
        ImageFolder(folder)


def test_metadata_is_refused_by_line_where_it_lacks_a_file_a_caption_or_json(tmp_path):
    folder = write_folder(tmp_path / "some", 2)
    first = json.dumps({"file_name": "000.png", "text": "a"})
    for second, message in [
        (json.dumps({"file_name": "001.png", "words": "b"}), r"line 2: no caption in 'text'; there are words"),
        (json.dumps({"text": "b"}), r"line 2: needed an object with file_name"),
        ("{", r"line 2: not JSON"),
        (json.dumps({"file_name": "gone.png", "text": "b"}), r"without file: .*gone\.png"),
        ("", r"001\.png; needed a line"),
    ]:
        (folder / "metadata.jsonl").write_text(f"{first}\n{second}\n", encoding="utf-8")
        with pytest.raises(SourceError, match=message):
            ImageFolder(folder)


def test_no_folder_and_no_images_are_said_at_once(tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="no images in it"):
        ImageFolder(tmp_path)


def test_a_dataset_names_the_columns_and_splits_that_it_has(tmp_path):
    datasets.DatasetDict({"train": as_dataset()}).save_to_disk(tmp_path / "set")
    with pytest.raises(SourceError, match="no column 'picture'; there are image, text"):
        HuggingFaceDataset(tmp_path / "set", image="picture")
    with pytest.raises(SourceError, match=r"column 'text' holds .*; needed images"):
        HuggingFaceDataset(tmp_path / "set", image="text")
    with pytest.raises(SourceError, match="no split 'test'; there are train"):
        HuggingFaceDataset(tmp_path / "set", split="test")
    with pytest.raises(SourceError, match="the datasets library cannot open it"):
        HuggingFaceDataset(tmp_path / "nowhere")
    as_dataset(text=lambda n: None if n == 2 else "a").save_to_disk(tmp_path / "gaps")
    with pytest.raises(SourceError, match=r"1 image without caption: gaps/train\[2\]"):
        HuggingFaceDataset(tmp_path / "gaps")


def test_tar_files_say_which_sample_lacks_what_and_which_file_is_damaged(tmp_path):
    with pytest.raises(SourceError, match=r"7 images without image or caption: 000\.tar/000 \(has png, txt\)"):
        tars(tmp_path, image="jpg")
    with pytest.raises(SourceError, match="and caption"):
        tars(tmp_path, caption="caption")
    content = (tmp_path / "001.tar").read_bytes()
    (tmp_path / "001.tar").write_bytes(content[: len(content) // 3])
    with pytest.raises(SourceError, match=r"001\.tar: cannot be read"):
        TarFiles(f"{tmp_path}/*.tar")
    with pytest.raises(SourceError, match="needed tar files on disk"):
        TarFiles("https://example.org/000.tar")


@pytest.mark.parametrize(("library", "kind"), [("datasets", HuggingFaceDataset), ("webdataset", TarFiles)])
def test_a_library_that_is_not_installed_is_named_with_its_extra(library, kind, monkeypatch, tmp_path):
    import importlib

    def missing(name, *args):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=rf"need {library}: pip install \"fastdistill\[images\]\""):
        kind(tmp_path)
