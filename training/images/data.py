"""Batches of images: read, framed, and encoded by the teacher as they come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..condition import Condition
from ..config import require
from ..draws import Draws
from ..teacher import Teacher
from .plan import Plan
from .reading import Images, Read


class ImageData:
    """Real images with captions as a `Data`: pixels, the teacher's latents (the posterior's mean), its conditions.

    Every image is shown once before any is shown twice, in an order of its own each time (of its bucket: `Plan`); one
    of its captions is drawn, and, as the framing says, its crop and whether it is mirrored. A batch is of one size,
    that of all processes together too, and depends on its place in the run alone. The batches that follow are decoded
    meanwhile.

    Args:
        images: what is read.
        teacher: whose encoders are used.
        seed: of the order.
        ahead: batches that are decoded before they are asked for; they are all that is held in memory.
    """

    def __init__(self, images: Images, teacher: Teacher, *, seed: int = 0, ahead: int = 2) -> None:
        require("ahead", ahead, ahead >= 0, "0 or more")
        self.images, self.teacher, self.ahead = images, teacher, ahead
        self.plan = Plan(images.members, seed)

    def batch(self, first: int, draws: Draws) -> dict[str, Any]:
        """`noise`, `condition`, `data`, `image`."""
        reads = read_batch(self.images, self.plan, first, draws, self.ahead)
        pixels, sizes, _ = views(self.images, reads, draws)
        image = pixels.to(draws.device)
        condition = self.teacher.encode(
            [read.captions[k] for read, k in zip(reads, caption_numbers([len(read.captions) for read in reads], draws))]
        )
        data = self.teacher.encode_images(image)
        noise = draws.randn(*data.shape[1:]).to(data)
        return {"noise": noise, "condition": with_sizes(condition, sizes), "data": data, "image": image}

    @property
    def networks(self) -> list[nn.Module]:
        """The teacher's encoders."""
        parts = (getattr(self.teacher.pipeline, name, None) for name in ("vae", "text_encoder", "text_encoder_2"))
        return [part for part in parts if part is not None]

    def figures(self) -> dict[str, float]:
        """For the log: how many images could not be read so far."""
        return {"unreadable_images": float(len(self.images.unreadable))}


def read_batch(images: Images, plan: Plan, first: int, draws: Draws, ahead: int) -> list[Read]:
    """This process's part of the batch that begins at `first`; the `ahead` batches after it are begun."""
    bucket, chosen = own_part(plan, first // draws.whole_batch, draws)
    following = [own_part(plan, first // draws.whole_batch + step, draws) for step in range(1, ahead + 1)]
    return images.read(bucket, chosen, following)


def own_part(plan: Plan, number: int, draws: Draws) -> tuple[int, Tensor]:
    """The bucket of a batch, and which of its images are this process's."""
    bucket, chosen = plan.batch(number, draws.whole_batch)
    own = draws.first_of(0)
    return bucket, chosen[own : own + draws.batch_size]


def caption_numbers(counts: list[int], draws: Draws) -> list[int]:
    """Which caption of each image is taken, where it has so many."""
    return [int(place * count) for place, count in zip(draws.fork("caption", "cpu").rand().tolist(), counts)]


def flips(images: Images, draws: Draws) -> list[bool]:
    """Which images are mirrored."""
    if not images.framing.flip:
        return [False] * draws.batch_size
    return (draws.fork("flip", "cpu").rand() < 0.5).tolist()


def views(images: Images, reads: list[Read], draws: Draws) -> tuple[Tensor, Tensor, list[bool]]:
    """Pixels (B, 3, H, W) and SDXL's sizes (B, 6), on the CPU, and which are mirrored."""
    mirrored = flips(images, draws)
    places: list = [None] * len(reads)
    if images.framing.crop == "random":
        places = draws.fork("crop", "cpu").rand(2).tolist()
    pixels, sizes = zip(*(read.image.view(place, flip) for read, place, flip in zip(reads, places, mirrored)))
    return torch.stack(pixels), torch.stack(sizes), mirrored


def with_sizes(condition: Condition, sizes: Tensor) -> Condition:
    """The condition with the images' own sizes, for networks that take any."""
    if condition.time_ids is None:
        return condition
    return Condition(condition.states, condition.pooled, sizes.to(condition.time_ids))
