"""Batches of images: the same at the same place of a run, whoever reads them, and whole where files are broken."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from fastdistill.training import Condition, Draws, PromptData
from fastdistill.training.data import PromptDropout
from fastdistill.training.images import Framing, ImageData, ImageFolder, Images, TooManyUnreadable, UnreadableImage

from .pictures import SIZES, picture, write_folder

COUNT = 23
SQUARE = Framing(32, 32)
ALL = Framing(32, 32, crop="random", flip=True, buckets=True, multiple=8)


class Encoders:
    """What `ImageData` asks of a teacher, told apart by eye: latents are block means, a text is its last digit."""

    def encode(self, prompts):
        digits = torch.tensor([float(prompt[-1]) for prompt in prompts])
        return Condition(digits.reshape(-1, 1, 1), digits.reshape(-1, 1), torch.zeros(len(prompts), 6))

    def encode_images(self, images):
        return torch.nn.functional.avg_pool2d(images, 4)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures", COUNT)


def image_data(folder, framing=SQUARE, ahead=2, workers=2, **options):
    return ImageData(Images(ImageFolder(folder), framing, workers=workers, **options), Encoders(), ahead=ahead)


def batch(data, number, batch_size=4, **options):
    draws = Draws(0, number, batch_size=batch_size, **options)
    return data.batch(number * draws.whole_batch, draws)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        for mine, other in zip(parts(value), parts(theirs[name])):
            assert torch.equal(mine, other), name


def parts(value):
    return [value.states, value.pooled, value.time_ids] if isinstance(value, Condition) else [value]


def numbers(found):
    """Which pictures a batch shows, by their captions' digit alone."""
    return found["condition"].pooled.flatten().int().tolist()


def test_a_batch_holds_pixels_latents_and_the_caption_of_the_same_image(tmp_path):
    data = image_data(write_folder(tmp_path / "ten", 10))
    compared = 0
    for number in range(3):
        found = batch(data, number)
        assert torch.equal(found["data"], Encoders().encode_images(found["image"]))
        for pixels, digit, sizes in zip(found["image"], numbers(found), found["condition"].time_ids.tolist()):
            height, width = SIZES[digit % len(SIZES)]
            assert sizes[:2] == [height, width]
            assert sizes[4:] == [32, 32]
            if min(height, width) == 32:  # what is not resized has the very pixels of its file
                top, left = (height - 32) // 2, (width - 32) // 2
                window = np.array(picture(digit))[top : top + 32, left : left + 32].transpose(2, 0, 1)
                np.testing.assert_allclose(pixels.numpy(), window / 127.5 - 1, atol=1e-6)
                assert sizes[2:4] == [top, left]
                compared += 1
    assert compared > 3


@pytest.mark.parametrize("framing", [SQUARE, ALL], ids=["square", "all"])
def test_a_batch_is_a_function_of_its_place_whatever_was_read_before_and_in_how_many_threads(folder, framing):
    expected = [batch(image_data(folder, framing, ahead=0, workers=0), number) for number in range(12)]
    running = image_data(folder, framing, ahead=3, workers=4)
    for number in range(12):
        assert_same(batch(running, number), expected[number])
    resumed = image_data(folder, framing)
    for number in (7, 8, 2):
        assert_same(batch(resumed, number), expected[number])


def test_processes_share_a_batch_of_one_size_and_see_together_what_one_sees(folder):
    for number in range(8):
        whole = batch(image_data(folder, ALL), number, 4)
        halves = [batch(image_data(folder, ALL), number, 2, rank=rank, world=2) for rank in range(2)]
        together = {name: [part[name] for part in halves] for name in whole}
        for name, value in whole.items():
            joined = [torch.cat(some) for some in zip(*(parts(part) for part in together[name]))]
            assert all(torch.equal(mine, other) for mine, other in zip(parts(value), joined)), name


def test_an_epoch_shows_every_image_once(tmp_path):
    data = image_data(write_folder(tmp_path / "ten", 10))
    for epoch in range(2):
        shown = [n for number in range(5) for n in numbers(batch(data, epoch * 5 + number, 2))]
        assert sorted(shown) == list(range(10))


def test_buckets_keep_the_shape_of_images_and_noise_has_that_of_their_latents(folder):
    shapes = set()
    for number in range(20):
        found = batch(image_data(folder, ALL), number)
        _, _, height, width = found["image"].shape
        shapes.add((height, width))
        assert found["noise"].shape == found["data"].shape == (4, 3, height // 4, width // 4)
        for digit, sizes in zip(numbers(found), found["condition"].time_ids.tolist()):
            assert sizes[4:] == [height, width]
            assert sizes[:2] in [list(SIZES[n % len(SIZES)]) for n in range(digit, COUNT, 10)]
    assert {(40, 24), (32, 32), (16, 64), (64, 16)} & shapes
    assert len(shapes) >= 3


def test_crops_and_mirroring_are_drawn_per_sample_and_leave_other_numbers_alone(folder):
    plain = [batch(image_data(folder), n) for n in range(6)]
    moved = [batch(image_data(folder, Framing(32, 32, crop="random", flip=True)), n) for n in range(6)]
    for one, other in zip(plain, moved):
        assert torch.equal(one["noise"], other["noise"])
        assert torch.equal(one["condition"].states, other["condition"].states)
    corners = {tuple(sizes[2:4]) for one in moved for sizes in one["condition"].time_ids.tolist()}
    assert len(corners) > 8
    mirrored = [batch(image_data(folder, Framing(32, 32, flip=True)), n) for n in range(6)]
    turned = [
        torch.equal(a.flip(2), b) for one, other in zip(plain, mirrored) for a, b in zip(one["image"], other["image"])
    ]
    kept = [torch.equal(a, b) for one, other in zip(plain, mirrored) for a, b in zip(one["image"], other["image"])]
    assert all(a != b for a, b in zip(turned, kept))
    assert 6 <= sum(turned) <= 18


def test_one_of_several_captions_is_drawn_per_sample(folder):
    for file in folder.glob("*.txt"):
        file.write_text("digit 1\ndigit 2\n", encoding="utf-8")
    shown = [n for number in range(10) for n in numbers(batch(image_data(folder), number))]
    assert 10 <= shown.count(1) <= 30
    assert shown.count(1) + shown.count(2) == 40


@pytest.mark.parametrize("workers", [0, 3])
def test_broken_images_are_named_once_counted_and_replaced_by_the_next_readable_one(tmp_path, workers):
    broken = (2, 3, 9)
    whole = image_data(write_folder(tmp_path / "whole", 10))
    data = image_data(write_folder(tmp_path / "broken", 10, broken), workers=workers, max_unreadable=0.3)
    next_readable = {2: 4, 3: 4, 9: 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(10):
            expected, found = batch(whole, number), batch(data, number)
            assert numbers(found) == [next_readable.get(digit, digit) for digit in numbers(expected)]
            same = [digit not in broken for digit in numbers(expected)]
            assert torch.equal(found["image"][same], expected["image"][same])
    named = [str(one.message) for one in caught if one.category is UnreadableImage]
    assert len(named) == len(broken)
    for number in broken:
        assert any(f"{number:03d}.png" in message for message in named)
        assert any(f"{number:03d}.png" in name for name in data.images.unreadable)
    assert data.figures() == {"unreadable_images": 3.0}


def test_more_unreadable_images_than_allowed_stop_the_run_and_are_listed(tmp_path):
    data = image_data(write_folder(tmp_path / "broken", 20, (3, 4)), max_unreadable=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreadableImage)
        with pytest.raises(TooManyUnreadable, match=r"2 of 20 images .* allows 1:") as stopped:
            any(batch(data, number) is None for number in itertools.count())
    assert "003.png: " in str(stopped.value)
    assert "004.png: " in str(stopped.value)


def test_with_buckets_what_has_no_header_is_found_before_the_first_batch(tmp_path):
    with pytest.warns(UnreadableImage, match=r"004\.png"), pytest.raises(TooManyUnreadable, match="1 of 10"):
        image_data(write_folder(tmp_path / "broken", 10, (4,)), ALL, max_unreadable=0.0)


def test_a_bucket_whose_images_are_all_cut_short_is_filled_from_the_others(tmp_path):
    folder = write_folder(tmp_path / "broken", 12, (1, 5, 9))  # all of one shape; their headers are whole
    data = image_data(folder, ALL, max_unreadable=0.3)
    with pytest.warns(UnreadableImage):
        shown = {n for number in range(12) for n in numbers(batch(data, number))}
    assert shown <= {0, 2, 3, 4, 6, 7, 8, 1}  # 1 is the digit of picture 11


def test_dropout_leaves_out_the_prompt_of_its_share_and_keeps_all_other_numbers():
    conditions = Condition(torch.ones(3, 2, 2), torch.ones(3, 2), torch.ones(3, 6))
    empty = Condition(torch.zeros(1, 2, 2), torch.zeros(1, 2), torch.zeros(1, 6))
    data = PromptData(conditions, (4,))
    dropped = PromptDropout(data, 0.25, empty)
    plain, found = batch(data, 0, 400), batch(dropped, 0, 400)
    without = found["condition"].states.flatten(1).sum(1) == 0
    assert 70 <= int(without.sum()) <= 130
    assert torch.equal(found["condition"].pooled[:, 0] == 0, without)
    assert torch.equal(found["condition"].time_ids, torch.ones(400, 6))
    assert torch.equal(found["noise"], plain["noise"])
    assert_same(batch(PromptDropout(data, 0.0, empty), 0), batch(data, 0))
    assert not batch(PromptDropout(data, 1.0, empty), 0)["condition"].states.any()
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\]; got 2"):
        PromptDropout(data, 2, empty)
