"""The real digits as training data for a teacher."""

import torch
from fastdistill.training import Draws, Teacher, digits_images

from fastdistill.models.digits import data as digits_data
from fastdistill.models.digits.text import captions

from ..toys import tiny_pipeline


def test_every_real_digit_comes_with_its_pixels_its_latents_and_its_own_captions(monkeypatch):
    few = digits_data.Digits(torch.rand(40, 1, 32, 32) * 2 - 1, torch.arange(40) % 10)  # all of them take seconds
    monkeypatch.setattr(digits_data, "load_digits", lambda: few)
    teacher = Teacher(tiny_pipeline())
    data = digits_images(teacher, batch_size=16)
    assert len(data.samples) == 40
    assert torch.equal(data.images, few.images.expand(-1, 3, -1, -1))
    some = torch.tensor([0, 17, 39])
    torch.testing.assert_close(data.samples[some], teacher.encode_images(data.images[some]), rtol=0, atol=1e-5)
    for place in some.tolist():
        expected = teacher.encode(captions(int(few.labels[place])))
        torch.testing.assert_close(data.conditions[data.captions[place]].states, expected.states)
    batch = data.batch(0, Draws(0, batch_size=3))
    assert batch["image"].shape == (3, 3, 32, 32)
    torch.testing.assert_close(batch["data"], teacher.encode_images(batch["image"]), rtol=0, atol=1e-5)
