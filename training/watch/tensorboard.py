"""The same figures and pictures for TensorBoard, where that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .record import GROUPS, Record

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class NoTensorBoard(ImportError):
    """The extra is not installed."""


class TensorBoard:
    """Writes each stage as a run of its own, `folder/<stage>`: `tensorboard --logdir folder`.

    Raises:
        NoTensorBoard: tensorboard is not installed; the message says how to.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise NoTensorBoard(
                f'TensorBoard is not installed ({error}): pip install "fastdistill[watch]"; everything else is written'
            ) from error
        self.folder, self._open = Path(folder), SummaryWriter
        self._writer: SummaryWriter | None = None

    def begin(self, stage: str, update: int) -> None:
        """What an earlier process wrote of `stage` past `update` is hidden by TensorBoard: no step is there twice."""
        self.close()
        self._writer = self._open(str(self.folder / stage), purge_step=update + 1)

    def write(self, record: Record) -> None:
        """Every figure of the record; those that are not finite are left out."""
        update = record["update"]
        for group in GROUPS:
            if group != "validation" or record["validated"] == update:
                for name, value in record[group].items():
                    if value is not None:
                        self._writer.add_scalar(f"{group}/{name}", value, update)
        for role, count in record["skipped"].items():
            self._writer.add_scalar(f"skipped/{role}", count, update)
        if record["peak_bytes"] is not None:
            self._writer.add_scalar(f"memory/{record['peak_of']}_peak_bytes", record["peak_bytes"], update)
        self._writer.flush()

    def picture(self, update: int, image: Image.Image) -> None:
        self._writer.add_image("samples", np.asarray(image.convert("RGB")), update, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
