"""Figures of a student while it learns: those of the finished one, of the same noise every time."""

import copy
from dataclasses import replace

import pytest
import torch
from fastdistill.training import Method, Teacher, validation
from fastdistill.training.pipelines import one_step_scheduler
from fastdistill.training.sampling import sample, sampler_of
from fastdistill.training.validation import ValidationConfig, Validator, digits_validation
from PIL import Image

from fastdistill.metrics import FrechetStatistics, frechet_distance, sliced_wasserstein
from fastdistill.metrics.compare import read_features
from fastdistill.models import load_pipeline
from fastdistill.models.digits.metrics import score
from fastdistill.models.digits.sampling import balanced_labels, generate

from .toys import tiny_pipeline

PROMPTS = ["a handwritten seven", "two", "digit 3"]


class OneStep(Method):
    name, start = "one step", 999

    def losses(self, role, step):
        raise NotImplementedError


class FourSteps(OneStep):
    def sampling(self):
        return {"steps": 4, "guidance_scale": 1.0}

    def scheduler(self, teacher_scheduler):
        return one_step_scheduler(teacher_scheduler, 999)


def thumbnails(images):
    """A feature function: (B, 3, H, W) to (B, 12)."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture(scope="module")
def teacher():
    return Teacher(tiny_pipeline())


def made(teacher, count, seed=0, steps=1):
    pipeline = sampler_of(teacher.pipeline, teacher.unet, one_step_scheduler(teacher.pipeline.scheduler, 999))
    return sample(pipeline, [PROMPTS[index * 3 // count] for index in range(count)], steps=steps, seed=seed)


@pytest.fixture
def folder(teacher, tmp_path):
    """The student's own pictures, which can then be no different from what it draws."""
    for index, pixels in enumerate(((made(teacher, 6) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    return tmp_path


def test_the_figures_of_the_digits_are_those_of_the_finished_student():
    pipeline = load_pipeline("digits-dmd")
    labels = balanced_labels(4)
    finished = score(generate(pipeline, labels, steps=1, seed=5), labels)
    state = torch.get_rng_state()
    figures = digits_validation(sampler_of(pipeline), seed=5, count=40, batch_size=16)
    assert list(figures) == ["fd", "accuracy", "diversity"]
    assert figures["fd"] == pytest.approx(finished.fd, abs=1e-4)
    assert figures["accuracy"] == finished.accuracy
    assert figures["diversity"] == pytest.approx(finished.diversity, abs=1e-4)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_student_is_sampled_as_its_method_says(teacher):
    validator = Validator(ValidationConfig("digits", count=20), teacher, PROMPTS)
    one, four = validator(teacher.unet, OneStep()), validator(teacher.unet, FourSteps())
    pipeline = sampler_of(teacher.pipeline, teacher.unet, one_step_scheduler(teacher.pipeline.scheduler, 999))
    assert one == digits_validation(pipeline, 1, count=20)
    assert four == digits_validation(pipeline, 4, count=20)
    assert one["fd"] != pytest.approx(four["fd"], abs=1e-6)


def test_another_student_has_other_figures_and_the_same_one_the_same(teacher):
    validator = Validator(ValidationConfig("digits", count=20), teacher, PROMPTS)
    other = copy.deepcopy(teacher.unet)
    with torch.no_grad():
        other.conv_out.bias += 0.1
    first = validator(teacher.unet, OneStep())
    torch.manual_seed(77)
    assert validator(teacher.unet, OneStep()) == first
    assert validator(other, OneStep())["fd"] != first["fd"]


def test_without_features_the_figure_is_the_sliced_wasserstein_distance_to_the_reference(teacher, folder):
    same = Validator(ValidationConfig("reference", count=6, reference=str(folder)), teacher, PROMPTS)
    assert same(teacher.unet, OneStep()) == {"sliced_wasserstein": 0.0}
    others = Validator(ValidationConfig("reference", count=6, seed=1, size=4, reference=str(folder)), teacher, PROMPTS)
    images = made(teacher, 6, seed=1)
    pixels = ((images + 1) * 127.5).round() / 127.5 - 1
    small = torch.nn.functional.adaptive_avg_pool2d(pixels, 4).permute(0, 2, 3, 1).flatten(1)
    expected = sliced_wasserstein(read_features(folder, 4), small)
    assert others(teacher.unet, OneStep())["sliced_wasserstein"] == pytest.approx(expected, abs=0.004)  # 8 bits
    assert expected > 0.05


@pytest.mark.parametrize("named", [True, False])
def test_with_features_it_is_their_frechet_distance(teacher, folder, named):
    config = ValidationConfig(
        "reference",
        count=6,
        seed=1,
        batch_size=4,
        reference=str(folder),
        features=f"{__name__}:thumbnails" if named else None,
    )
    validator = Validator(config, teacher, PROMPTS, features=None if named else thumbnails)
    eight_bits = ((made(teacher, 6) + 1) * 127.5).round() / 127.5 - 1
    expected = frechet_distance(thumbnails(eight_bits), thumbnails(made(teacher, 6, seed=1)))
    assert validator(teacher.unet, OneStep()) == {"fd": pytest.approx(expected, rel=1e-3)}
    assert expected > 1e-3


def test_inception_weights_give_fid_of_images_as_it_reads_them(teacher, folder, monkeypatch):
    def inception(weights, device):
        assert weights == "inception.pth"

        def features(images):
            assert 0 <= images.min() < images.max() <= 1
            return thumbnails(2 * images - 1)

        return features

    monkeypatch.setattr(validation, "inception_features", inception)
    config = ValidationConfig("reference", count=6, seed=1, reference=str(folder), features="inception.pth")
    figures = Validator(config, teacher, PROMPTS)(teacher.unet, OneStep())
    ours = Validator(replace(config, features=None), teacher, PROMPTS, features=thumbnails)
    assert figures == {"fid": pytest.approx(ours(teacher.unet, OneStep())["fd"], rel=1e-3)}


def test_statistics_gathered_before_serve_as_a_reference(teacher, tmp_path):
    path = tmp_path / "real.npz"
    FrechetStatistics().update(thumbnails(made(teacher, 6))).save(path)
    config = ValidationConfig("reference", count=6, reference=str(path))
    validator = Validator(config, teacher, PROMPTS, features=thumbnails)
    assert validator(teacher.unet, OneStep())["fd"] == pytest.approx(0, abs=1e-6)


def test_pictures_of_another_size_are_cut_to_the_student_s(teacher, tmp_path):
    for index in range(2):
        picture = Image.new("RGB", (96, 32), (255, 0, 0))
        picture.paste((0, 0, 255), (32, 0, 64, 32))
        picture.save(tmp_path / f"{index}.jpg", quality=100)
    seen = []

    def features(images):
        seen.append(images)
        return thumbnails(images)

    Validator(ValidationConfig("reference", count=2, reference=str(tmp_path)), teacher, PROMPTS, features=features)
    (images,) = seen
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images.mean((2, 3))[0], torch.tensor([-1.0, -1.0, 1.0]), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "fid"}, "kind must be one of none, digits, reference; got fid"),
        ({"kind": "digits", "count": 25}, "count must be a multiple of 10, 20 or more; got 25"),
        ({"kind": "reference"}, "reference must be a folder"),
        ({"count": 1}, "count must be 2 or more; got 1"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ValidationConfig(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"features": "no.such.module:f"}, "cannot be imported"),
        ({"features": "math:pi"}, "is float; needed a function"),
        ({"features": "math"}, "cannot be imported"),
        ({}, "there is no such file or folder"),
    ],
)
def test_a_reference_or_features_that_cannot_be_read_are_refused_before_the_run(teacher, tmp_path, given, message):
    config = ValidationConfig("reference", reference=str(tmp_path / "nothing"), **given)
    with pytest.raises((ValueError, OSError), match=message):
        Validator(config, teacher, PROMPTS)


def test_a_broken_picture_is_named(teacher, folder):
    (folder / "3.png").write_bytes(b"no picture")
    config = ValidationConfig("reference", count=2, reference=str(folder))
    for features in (None, thumbnails):
        with pytest.raises(ValueError, match=r"3\.png.* read"):
            Validator(config, teacher, PROMPTS, features=features)
