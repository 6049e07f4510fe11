"""Batches of the right shapes for a plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..condition import Condition
from ..data import Data, networks_of
from ..draws import Draws
from .teacher import PlannedTeacher


class PlannedImages:
    """Real samples that are not there: fake latents with their condition, and pixels.

    Args:
        teacher: whose latents they are.
        like: what else a batch of one sample holds, by name: tensors or conditions.
        encoders: whether batches are encoded as they come, and not before the run.
    """

    def __init__(self, teacher: PlannedTeacher, like: dict[str, Any] | None = None, encoders: bool = False) -> None:
        self.teacher, self.encoders = teacher, encoders
        self.like = _of_teacher(teacher) if like is None else like

    def batch(self, first: int, draws: Draws) -> dict[str, Any]:
        batch = {name: self._several(each, draws.batch_size) for name, each in self.like.items()}
        if self.encoders:
            batch["data"] = self.teacher.encode_images(batch["image"])
        return batch

    @property
    def networks(self) -> list[nn.Module]:
        """Those that encode batches."""
        if not self.encoders:
            return []
        return [part for name, part in self.teacher.pipeline.components.items() if name in ("vae", *_TEXT_ENCODERS)]

    def _several(self, one: Tensor | Condition, count: int) -> Tensor | Condition:
        if isinstance(one, Condition):
            return one.map(lambda t: self._several(t, count))
        with self.teacher.fake:
            return torch.empty(count, *one.shape[1:], dtype=one.dtype)


def planned_images(images: Data, teacher: PlannedTeacher, device: torch.device | str) -> PlannedImages:
    """In place of images that are there: as one batch of one of them is."""
    batch = images.batch(0, Draws("plan", batch_size=1, device=device))
    return PlannedImages(teacher, batch, encoders=bool(networks_of(images)))


def tensors_of(data: Any, kind: type = Tensor) -> list[Any]:
    """The tensors that data holds on the device, its conditions and pairs among them; or all it holds of a kind."""
    found, seen, left = [], set(), [data]
    while left:
        each = left.pop()
        if isinstance(each, kind):
            found.append(each)
        if isinstance(each, Tensor):
            continue
        if isinstance(each, (tuple, list)):
            left += each
        elif type(each).__module__.startswith(__name__.partition(".simulation")[0]) and id(each) not in seen:
            seen.add(id(each))
            left += [value for value in vars(each).values() if not isinstance(value, nn.Module)]
    return found


_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def _of_teacher(teacher: PlannedTeacher) -> dict[str, Any]:
    channels, height, width = teacher.sample_shape
    scale = teacher.pipeline.vae_scale_factor
    with teacher.fake:
        latents = torch.empty(1, channels, height, width)
        image = torch.empty(1, 3, scale * height, scale * width)
    return {"noise": latents, "condition": teacher.encode([""]), "data": latents, "image": image}
