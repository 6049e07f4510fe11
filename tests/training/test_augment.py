"""DiffAug, by what each augmentation is in closed form."""

import pytest
import torch
from fastdistill.training.augment import AUGMENTATIONS, augment
from fastdistill.training.draws import Draws

SHAPE = (64, 3, 16, 24)


def draws(*key, batch_size=SHAPE[0]):
    return Draws(*key, batch_size=batch_size)


@pytest.fixture
def images():
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def test_brightness_adds_one_number_to_each_image(images):
    added = augment(images, draws(0), "brightness") - images
    numbers = added[:, :1, :1, :1]
    torch.testing.assert_close(added, numbers.expand_as(added))
    assert numbers.abs().max() <= 0.5
    assert numbers.std() > 0.2  # uniform over an interval of 1: 0.29


def test_saturation_scales_the_distance_from_grey(images):
    found = augment(images, draws(0), "saturation")
    grey = images.mean(dim=1, keepdim=True)
    torch.testing.assert_close(found.mean(dim=1, keepdim=True), grey)
    factor = ((found - grey) / (images - grey)).flatten(1)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))
    assert 0 <= factor.min() < 0.2
    assert 1.8 < factor.max() <= 2


def test_contrast_scales_the_distance_from_the_mean(images):
    found = augment(images, draws(0), "contrast")
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    factor = ((found - mean) / (images - mean)).flatten(1)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))
    assert 0.5 <= factor.min() < 0.6
    assert 1.4 < factor.max() <= 1.5


def test_color_is_brightness_saturation_and_contrast(images):
    source, own = draws(0).fork("color"), images
    for name in ("brightness", "saturation", "contrast"):
        own = AUGMENTATIONS[name](own, source.fork(name))
    assert torch.equal(augment(images, draws(0), "color"), own)


def test_translation_is_a_roll_with_zeros_coming_in(images):
    found = augment(images, draws(0), "translation")
    shifts = set()
    for image, moved in zip(images, found):
        matches = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-3, 4)
            if torch.equal(rolled_in_zeros(image, down, right), moved)
        ]
        assert len(matches) == 1
        shifts.add(matches[0])
    assert {down for down, _ in shifts} == set(range(-2, 3))
    assert {right for _, right in shifts} == set(range(-3, 4))


def rolled_in_zeros(image, down, right):
    padded = torch.nn.functional.pad(image, (3, 3, 2, 2))
    return torch.roll(padded, (down, right), dims=(1, 2))[:, 2:-2, 3:-3]


def test_cutout_zeroes_exactly_one_window_of_half_of_each_side(images):
    found = augment(images + 3, draws(0), "cutout")  # no value is zero before
    sizes = set()
    for image, cut in zip(images + 3, found):
        gone = cut == 0
        rows, columns = gone.any(dim=2).any(dim=0).nonzero()[:, 0], gone.any(dim=1).any(dim=0).nonzero()[:, 0]
        inside = torch.zeros_like(gone)
        if gone.any():
            inside[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        assert torch.equal(gone, inside)
        assert torch.equal(cut, torch.where(gone, 0, image))
        sizes.add((len(rows), len(columns)))
    assert max(sizes) == (8, 12)  # whole ones; at the border less


def test_gradients_flow_through_the_whole_policy(images):
    few = images[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, draws(0, batch_size=2)), few[:, :, :6, :6])


def test_the_same_draws_repeat_and_real_and_generated_differ(images):
    real, generated = draws(0).fork("real"), draws(0).fork("generated")
    assert torch.equal(augment(images, real), augment(images, draws(0).fork("real")))
    assert not torch.equal(augment(images, real), augment(images, generated))


def test_a_policy_is_a_string_or_names_and_may_be_empty(images):
    assert torch.equal(augment(images, draws(0), "color, cutout"), augment(images, draws(0), ("color", "cutout")))
    assert torch.equal(augment(images, draws(0), ""), images)


def test_two_processes_augment_their_halves_as_one_would_the_whole(images):
    halves = [
        augment(half, Draws(0, batch_size=SHAPE[0] // 2, rank=rank, world=2))
        for rank, half in enumerate(images.chunk(2))
    ]
    assert torch.equal(torch.cat(halves), augment(images, draws(0)))


def test_an_unknown_name_and_a_wrong_batch_are_refused(images):
    with pytest.raises(ValueError, match="policy: 'colour' is no augmentation; known: color"):
        augment(images, draws(0), "colour")
    with pytest.raises(ValueError, match=r"images: shape \(64, 3, 16, 24\); needed \(2, C, H, W\)"):
        augment(images, draws(0, batch_size=2))
