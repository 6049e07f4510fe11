"""The 32x32 digits carry exactly the published 8x8 data."""

import sys

import pytest
import torch
import torch.nn.functional as F

from fastdistill.models.digits.data import enlarge, load_digits, load_originals
from fastdistill.models.digits.figures import as_saved
from fastdistill.models.digits.metrics import frechet


def test_there_are_all_1797_digits_of_ten_classes():
    images, labels = load_digits()
    assert images.shape == (1797, 1, 32, 32)
    assert images.dtype == torch.float32
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_block_means_are_the_published_values():
    originals, images = load_originals().images, load_digits().images
    assert originals.min() == -1
    assert originals.max() == 1
    torch.testing.assert_close(F.avg_pool2d(images, 4), originals, rtol=0, atol=1e-6)
    assert images.abs().max() <= 1


def test_real_digits_saved_as_8_bit_pictures_keep_a_frechet_distance_under_one_hundredth():
    assert frechet(as_saved(load_digits().images)) < 0.01


def test_enlarged_images_are_smooth_rather_than_blocks():
    originals, images = load_originals().images[:100], load_digits().images[:100]
    blocks = F.interpolate(originals, scale_factor=4)

    def at_block_edges(x):
        return (x[..., 4::4] - x[..., 3:-1:4]).abs().mean()

    assert at_block_edges(images) < 0.5 * at_block_edges(blocks)


def test_enlarge_keeps_block_means_of_the_extremes():
    generator = torch.Generator().manual_seed(0)
    originals = torch.randint(0, 2, (8, 1, 8, 8), generator=generator).double() * 2 - 1  # only paper and ink
    torch.testing.assert_close(F.avg_pool2d(enlarge(originals), 4), originals, rtol=0, atol=1e-6)


def test_callers_may_change_what_they_get():
    load_digits().images.zero_()
    assert load_digits().images.abs().sum() > 0


@pytest.mark.parametrize("bad", [torch.zeros(8, 8), torch.full((1, 1, 8, 8), 1.5), torch.full((1, 1, 8, 8), torch.nan)])
def test_enlarge_names_bad_input(bad):
    with pytest.raises(ValueError, match="originals"):
        enlarge(bad)


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "fastdistill\[demo\]"'):
        load_originals()
