"""What the student draws while it learns: the same prompts and the same noise every time, as one picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastdistill._output import write_files
from fastdistill._pictures import enlarge, png

from ..sampling import sample, sampler_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

COLUMNS, ROWS = 10, 2
SMALLEST, LARGEST, GAP = 64, 256, 4
"""Pixels of a cell's side: smaller images are enlarged, larger ones reduced; and between two cells."""

Sampler = Callable[[nn.Module, Any, Mapping[str, Any]], Tensor]
"""From (student, scheduler of the teacher's to scheduler of the student's, how it is sampled) to images (N, 3, H, W)
in [-1, 1]."""


class Samples:
    """Draws the same pictures of every student of one teacher.

    Args:
        teacher: the pipeline that is distilled; its parts decode and encode.
        prompts: what can be asked for; some, evenly spread, stand over the columns.
        seed: of the noise; the rows differ in noise alone.
        teacher_steps, teacher_guidance: how the teacher draws the picture to compare with.
        batch_size: images made at once.

    Attributes:
        prompts: of every image, row by row.
    """

    def __init__(
        self,
        teacher: DiffusionPipeline,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        teacher_steps: int = 25,
        teacher_guidance: float = 1.0,
        batch_size: int = COLUMNS * ROWS,
    ) -> None:
        if not prompts:
            raise ValueError("prompts: none; needed 1 or more to draw pictures of")
        self.teacher, self.seed, self.batch_size = teacher, seed, batch_size
        self.teacher_steps, self.teacher_guidance = teacher_steps, teacher_guidance
        self.prompts = [prompts[column * len(prompts) // COLUMNS] for column in range(COLUMNS)] * ROWS

    def of_student(self, student: nn.Module, scheduler: Callable[[Any], Any], sampling: Mapping[str, Any]) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1].

        Args:
            student: in evaluation mode.
            scheduler, sampling: as of a `Method`.
        """
        pipeline = sampler_of(self.teacher, student, scheduler(self.teacher.scheduler))
        return self._sample(pipeline, sampling["steps"], sampling.get("guidance_scale", 1.0))

    def of_teacher(self) -> Tensor:
        return self._sample(sampler_of(self.teacher), self.teacher_steps, self.teacher_guidance)

    def _sample(self, pipeline: DiffusionPipeline, steps: int, guidance_scale: float) -> Tensor:
        return sample(
            pipeline,
            self.prompts,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=self.seed,
            batch_size=self.batch_size,
        )


def sheet(images: Tensor, columns: int = COLUMNS) -> Image.Image:
    """Images (N, 3, H, W) in [-1, 1] as one RGBA picture, row by row, transparent between them."""
    cells = [_fitted(Image.fromarray(pixels)) for pixels in _bytes(images)]
    width, height = cells[0].size
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    whole = Image.new("RGBA", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP))
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        whole.paste(cell, (column * (width + GAP), row * (height + GAP)))
    return whole


def save_sheet(image: Image.Image, path: Path, facts: Mapping[str, str]) -> None:
    """As PNG with `facts` in it, whole or not at all. Raises OutputError if it cannot be written."""
    write_files({path: png(image, facts)})


def _bytes(images: Tensor) -> Any:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _fitted(image: Image.Image) -> Image.Image:
    side = max(image.size)
    if side < SMALLEST:
        return enlarge(image, -(-SMALLEST // side))
    image = image.copy()
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)  # leaves smaller ones as they are
    return image
