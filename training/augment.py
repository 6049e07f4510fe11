"""DiffAug: differentiable augmentation of what a discriminator sees, real and generated alike.

Zhao et al., arXiv 2006.10738. The strengths are theirs: brightness ±1/2, saturation 0 to 2, contrast 1/2 to 3/2,
translation by up to 1/8 of each side, cutout of a window of half of each side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .draws import Draws

POLICY = "color,translation,cutout"


def augment(images: Tensor, draws: Draws, policy: str | Sequence[str] = POLICY) -> Tensor:
    """Images (B, C, H, W), each augmented in its own way; same shape and dtype, differentiable in `images`.

    Args:
        images: floating, in [-1, 1]; 0 is what translation and cutout fill with, as in the paper's code.
        draws: of a batch of B. Real and generated images take draws of their own (`draws.fork("real")`).
        policy: of `AUGMENTATIONS`, applied in the order named; a string separates them by commas. "" leaves the images.

    Raises:
        ValueError: an unknown name in `policy`, a shape that is not (B, C, H, W), or draws of another batch size.
    """
    names = augmentations(policy)
    if images.ndim != 4 or len(images) != draws.batch_size:
        raise ValueError(f"images: shape {tuple(images.shape)}; needed ({draws.batch_size}, C, H, W), as the draws say")
    for name in names:
        images = AUGMENTATIONS[name](images, draws.fork(name))
    return images


def augmentations(policy: str | Sequence[str]) -> tuple[str, ...]:
    """The names in a policy; a ValueError for one that is not known."""
    listed = policy.split(",") if isinstance(policy, str) else policy
    names = tuple(name.strip() for name in listed if name.strip())
    for name in names:
        if name not in AUGMENTATIONS:
            raise ValueError(f"policy: {name!r} is no augmentation; known: {', '.join(AUGMENTATIONS)}")
    return names


def brightness(images: Tensor, draws: Draws) -> Tensor:
    """One number of [-1/2, 1/2) added to each image."""
    return images + (_per_sample(draws, images) - 0.5)


def saturation(images: Tensor, draws: Draws) -> Tensor:
    """Each pixel's distance from its grey value times one number of [0, 2) per image."""
    grey = images.mean(dim=1, keepdim=True)
    return (images - grey) * (2 * _per_sample(draws, images)) + grey


def contrast(images: Tensor, draws: Draws) -> Tensor:
    """The distance from the image's mean times one number of [1/2, 3/2) per image."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (_per_sample(draws, images) + 0.5) + mean


def color(images: Tensor, draws: Draws) -> Tensor:
    """Brightness, saturation and contrast."""
    for change in (brightness, saturation, contrast):
        images = change(images, draws.fork(change.__name__))
    return images


def translation(images: Tensor, draws: Draws, ratio: float = 1 / 8) -> Tensor:
    """Moved by whole pixels, up to `ratio` of each side; 0 comes in."""
    height, width = images.shape[-2:]
    down, right = (_shift(draws, int(side * ratio + 0.5)) for side in (height, width))
    rows, rows_inside = _moved(height, down)
    columns, columns_inside = _moved(width, right)
    batch = torch.arange(len(images), device=images.device)
    moved = images.movedim(1, -1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    return moved * (rows_inside[:, None, :, None] & columns_inside[:, None, None, :])


def cutout(images: Tensor, draws: Draws, ratio: float = 1 / 2) -> Tensor:
    """A window of `ratio` of each side becomes 0; its middle is anywhere, so that it may reach over the border."""
    height, width = images.shape[-2:]
    inside = [_window(draws, side, int(side * ratio + 0.5)) for side in (height, width)]
    return images * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


AUGMENTATIONS: dict[str, Callable[[Tensor, Draws], Tensor]] = {
    "color": color,
    "translation": translation,
    "cutout": cutout,
    "brightness": brightness,
    "saturation": saturation,
    "contrast": contrast,
}
"""By the names that a policy uses; "color" is the last three together."""


def _per_sample(draws: Draws, like: Tensor) -> Tensor:
    return draws.rand(1, 1, 1).to(like)


def _shift(draws: Draws, most: int) -> Tensor:
    """(B, 1) of -most … most."""
    return draws.randint(-most, most + 1, 1)


def _moved(side: int, by: Tensor) -> tuple[Tensor, Tensor]:
    """Where each place of a row comes from (B, side), and whether that is inside."""
    places = torch.arange(side, device=by.device) - by
    return places.clamp(0, side - 1), (places >= 0) & (places < side)


def _window(draws: Draws, side: int, length: int) -> Tensor:
    """(B, side), true in a window of `length` whose middle is drawn."""
    # The paper's code: of an even window as many middles as places, of an odd one no more than fit one further.
    start = draws.randint(0, side + (1 - length % 2), 1) - length // 2
    places = torch.arange(side, device=start.device)
    return (places >= start) & (places < start + length)
