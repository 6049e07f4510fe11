"""Crops, flips, buckets, and the sizes that SDXL is told."""

import math

import numpy as np
import pytest
import torch
from fastdistill.training.images import Framing
from fastdistill.training.images.framing import cover, open_image, upright_size
from PIL import Image


def ramp(height, width):
    """Red tells the row and green the column."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([y, x, 0 * x], -1).astype(np.uint8))


def rows_and_columns(pixels):
    """(top, left) and whether columns fall, of a view of a ramp at its own size."""
    values = ((pixels + 1) * 127.5).round()
    return int(values[0, 0, 0]), int(values[1, 0, 0]), bool(values[1, 0, 0] > values[1, 0, -1])


def test_a_crop_is_where_the_sizes_say_and_the_original_size_is_kept():
    image = cover(ramp(20, 32), (20, 16))
    for place, left in [(None, 8), ((0.0, 0.0), 0), ((0.5, 0.5), 8), ((0.999, 0.999), 16)]:
        pixels, sizes = image.view(place, flip=False)
        assert rows_and_columns(pixels) == (0, left, False)
        assert sizes.tolist() == [20, 32, 0, left, 20, 16]


def test_a_mirrored_view_is_cropped_after_mirroring():
    pixels, sizes = cover(ramp(20, 32), (20, 16)).view((0.0, 0.0), flip=True)
    assert rows_and_columns(pixels) == (0, 31, True)
    assert sizes.tolist() == [20, 32, 0, 0, 20, 16]


def test_images_are_resized_to_cover_the_size_and_only_the_excess_of_one_side_is_cut():
    large = cover(ramp(100, 200), (20, 16))
    assert large.pixels.shape == (20, 40, 3)
    small = cover(ramp(10, 4), (20, 16))
    assert small.pixels.shape == (40, 16, 3)
    assert small.view(None, flip=False)[1].tolist() == [10, 4, 10, 0, 20, 16]


def test_pixels_are_the_files_own_in_minus_one_to_one():
    pixels, _ = cover(ramp(16, 16), (16, 16)).view(None, flip=False)
    torch.testing.assert_close(pixels[0, :, 0], torch.arange(16) / 127.5 - 1)
    white, _ = cover(Image.new("L", (16, 16), 255), (16, 16)).view(None, flip=False)
    assert torch.equal(white, torch.ones(3, 16, 16))


def test_what_lies_on_its_side_is_turned_upright_and_its_size_is_known_from_the_header(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    ramp(8, 24).save(tmp_path / "side.png", exif=exif)
    assert upright_size(open_image(tmp_path / "side.png")) == (24, 8)
    turned = cover(open_image(tmp_path / "side.png"), (24, 8))
    expected = np.rot90(np.array(ramp(8, 24)), -1)
    np.testing.assert_array_equal(turned.pixels.numpy(), expected)


def test_transparent_is_white_and_sixteen_bits_keep_their_range():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert int(cover(clear, (8, 8)).pixels.min()) == 255
    deep = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    assert cover(deep, (8, 8)).pixels.unique().tolist() == [0x80]


def test_buckets_have_sides_of_the_multiple_about_the_area_and_no_side_could_be_longer():
    framing = Framing(1024, 1024, buckets=True)
    sizes = framing.sizes
    assert (1024, 1024) in sizes
    assert (1152, 896) in sizes
    assert (640, 1536) in sizes
    assert len(set(sizes)) == len(sizes)
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert height * width <= 1024 * 1024 < max(height, width) * (min(height, width) + 64)
        assert max(height, width) <= 4 * min(height, width)


def test_an_image_goes_to_the_bucket_of_the_nearest_shape_whatever_its_scale():
    framing = Framing(1024, 1024, buckets=True)
    for size in [(300, 300), (3000, 3000)]:
        assert framing.sizes[framing.bucket(size)] == (1024, 1024)
    for size in [(100, 900), (90, 100), (1000, 333)]:
        found = framing.sizes[framing.bucket(size)]
        off = [abs(math.log(w / h) - math.log(size[1] / size[0])) for h, w in framing.sizes]
        assert abs(math.log(found[1] / found[0]) - math.log(size[1] / size[0])) == min(off)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 0}, "height must be 1 or more; got 0"),
        ({"crop": "left"}, "crop must be one of center, random; got left"),
        ({"max_aspect": 0.5}, "max_aspect must be 1 or more; got 0.5"),
        ({"buckets": True}, "multiple 64, max_aspect 4.0: no bucket of 32x32 pixels"),
        ({"buckets": True, "multiple": 20, "max_aspect": 1.0}, "multiple 20, max_aspect 1.0: no bucket of 32x32"),
    ],
)
def test_a_framing_that_cannot_be_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Framing(**{"height": 32, "width": 32} | options)
