"""The Trainer on a folder of digits, some of whose files are broken; and what a configuration opens."""

import copy
import warnings

import numpy as np
import pytest
import torch
from fastdistill.training import Draws, RoleConfig, Teacher, Trainer, TrainerConfig
from fastdistill.training.data import LatentData, PromptDropout
from fastdistill.training.images import (
    CachedImageData,
    ImageData,
    ImagesConfig,
    SourceError,
    UnreadableImage,
    open_images,
)
from fastdistill.training.method import Losses, Method, Turn
from fastdistill.training.networks import predict
from fastdistill.training.settings import from_dict
from PIL import Image

from fastdistill import diffusion
from fastdistill.losses import denoising_loss
from fastdistill.models.digits.data import load_originals
from fastdistill.models.digits.text import prompt

from ..toys import tiny_pipeline
from .pictures import write_tar

BROKEN = (7, 30)


class Denoising(Method):
    """The teacher's own training: what the simplest method makes of images."""

    name = "denoising"
    start = 999

    def __init__(self, teacher):
        self.roles = {"student": copy.deepcopy(teacher.unet)}
        self.turns = (Turn("student"),)
        self.schedule, self.prediction_type = teacher.schedule, teacher.prediction_type

    def losses(self, role, step):
        x0, noise = step.batch["data"], step.batch["noise"]
        t = step.draws.randint(0, len(self.schedule))
        alpha, sigma = self.schedule.at(t)
        x_t = diffusion.add_noise(x0, noise, alpha, sigma)
        pred = predict(self.roles["student"], x_t, t, step.batch["condition"])
        loss = denoising_loss(pred, x0, noise, alpha, sigma, prediction_type=self.prediction_type)
        return Losses({"denoising": loss})


@pytest.fixture(scope="module")
def teacher():
    return Teacher(tiny_pipeline())


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "digits"
    folder.mkdir()
    originals = load_originals()
    for number in range(40):
        pixels = ((originals.images[number, 0] + 1) * 127.5).byte().numpy()
        Image.fromarray(np.kron(pixels, np.ones((5, 5), np.uint8))).save(folder / f"{number:02d}.png")
        caption = prompt(int(originals.labels[number]))
        (folder / f"{number:02d}.txt").write_text(caption, encoding="utf-8")
    for number in BROKEN:
        file = folder / f"{number:02d}.png"
        file.write_bytes(file.read_bytes()[:60])
    return folder


def config(digits, **options):
    values = {"source": str(digits), "crop": "random", "flip": True, "dropout": 0.1, "max_unreadable": 0.1}
    return from_dict(ImagesConfig, values | {"buckets": True, "bucket_multiple": 8} | options)


def run(teacher, data, updates, folder=None, resume=False, callback=None):
    torch.manual_seed(1)
    options = TrainerConfig(updates=updates, batch_size=4, accumulation=2, ema_decay=0.9, report_every=1)
    roles = {"student": RoleConfig(learning_rate=1e-3)}
    trainer = Trainer(Denoising(teacher), data, options, roles, folder=folder)
    if resume:
        assert trainer.resume() is not None
    return trainer.run(callback)


def test_a_folder_with_broken_images_trains_names_them_and_resumes_exactly(teacher, digits, tmp_path):
    reports = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = open_images(config(digits), teacher)
        whole = run(teacher, data, 12, callback=lambda progress: reports.append(progress.losses))
    assert whole.ended == "finished"
    named = {str(one.message).split(":")[0] for one in caught if one.category is UnreadableImage}
    assert named == {str(digits / f"{number:02d}.png") for number in BROKEN}
    assert reports[-1]["unreadable_images"] == whole.losses["unreadable_images"] == len(BROKEN)
    assert all(np.isfinite(report["denoising"]) for report in reports)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreadableImage)
        run(teacher, open_images(config(digits), teacher), 12, tmp_path / "run", callback=lambda p: p.update == 5)
        resumed = run(teacher, open_images(config(digits, workers=0), teacher), 12, tmp_path / "run", resume=True)
    ours, theirs = resumed.student.state_dict(), whole.student.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_configuration_opens_what_its_source_is(teacher, digits, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreadableImage)
        dropped = open_images(config(digits), teacher)
        assert isinstance(dropped, PromptDropout)
        assert isinstance(dropped.data, ImageData)
        assert torch.equal(dropped.unconditional.states, teacher.unconditional.states)
        options = {"crop": "center", "dropout": 0.0, "cache": str(tmp_path / "cache"), "pixels": False}
        cached = open_images(config(digits, **options), teacher)
    assert isinstance(cached, CachedImageData)
    assert "image" not in cached.batch(0, Draws(0, batch_size=2))
    write_tar(tmp_path / "000.tar", range(4))
    tars = open_images(ImagesConfig(str(tmp_path / "*.tar")), teacher)
    assert tars.images.source.name(0) == "000.tar/000.png"
    assert tars.batch(0, Draws(0, batch_size=2))["image"].shape == (2, 3, 32, 32)


def test_the_digits_are_a_source_by_name(teacher, monkeypatch):
    from fastdistill.models.digits import data as digits_data

    few = digits_data.Digits(torch.rand(20, 1, 32, 32) * 2 - 1, torch.arange(20) % 10)
    monkeypatch.setattr(digits_data, "load_digits", lambda: few)
    data = open_images(ImagesConfig("digits"), teacher)
    assert isinstance(data, LatentData)
    assert len(data.samples) == 20


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": None}, ValueError, "source must be a folder, tar files, a dataset, or digits; got None"),
        ({"source": "nowhere/at/all"}, SourceError, "no such folder; to open a dataset by its name"),
        ({"resolution": 30, "buckets": False}, ValueError, "resolution must be a multiple of 4.*; got 30"),
        ({"bucket_multiple": 6}, ValueError, "bucket_multiple must be a multiple of 4.*; got 6"),
        ({"image": "jpg"}, ValueError, "image: a folder has no columns"),
        ({"kind": "files"}, ValueError, "kind must be one of auto, folder, .*; got files"),
        ({"cache": "there"}, ValueError, "crop must be center where images are cached"),
        ({"dropout": 1.5}, ValueError, r"dropout must be in \[0, 1\]; got 1.5"),
        ({"max_unreadable": 1.0}, ValueError, r"max_unreadable must be in \[0, 1\); got 1.0"),
        ({"resolution": 0}, ValueError, "resolution must be 1 or more; got 0"),
        ({"flop": True}, ValueError, "flop: unknown setting; did you mean flip"),
    ],
)
def test_a_bad_configuration_is_refused_by_name_before_anything_is_read(options, error, message, teacher, digits):
    with pytest.raises(error, match=message):
        open_images(config(digits, **options), teacher)
