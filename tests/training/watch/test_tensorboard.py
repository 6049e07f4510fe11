"""TensorBoard reads what was written: every step once, and the pictures themselves."""

import io
import sys

import numpy as np
import pytest
import torch
from fastdistill.training.watch import NoTensorBoard, TensorBoard, record, sheet
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

from .toys import a_report


def read(folder):
    found = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def test_every_figure_is_there_with_its_update(tmp_path):
    board = TensorBoard(tmp_path)
    board.begin("dmd", 0)
    board.write(record(a_report(10, losses={"dmd": 0.5}, validation={"fd": 2.0}, validated=10, peak_bytes=7)))
    board.write(record(a_report(20, losses={"dmd": float("nan")}, validation={"fd": 2.0}, validated=10, peak_bytes=9)))
    board.close()
    found = read(tmp_path / "dmd")
    figures = {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert figures["losses/dmd"] == [(10, 0.5)]
    assert figures["validation/fd"] == [(10, 2.0)]
    assert figures["memory/device_peak_bytes"] == [(10, 7.0), (20, 9.0)]
    assert figures["skipped/student"] == [(10, 0.0), (20, 0.0)]
    assert figures["learning_rates/student"] == [(10, pytest.approx(1e-4)), (20, pytest.approx(1e-4))]


def test_a_resumed_run_has_no_step_twice(tmp_path):
    killed = TensorBoard(tmp_path)
    killed.begin("dmd", 0)
    for update in (10, 20, 30):
        killed.write(record(a_report(update, losses={"dmd": 1.0})))
    resumed = TensorBoard(tmp_path)
    resumed.begin("dmd", 15)
    for update in (20, 30, 40):
        resumed.write(record(a_report(update, losses={"dmd": 2.0})))
    resumed.close()
    found = read(tmp_path / "dmd").Scalars("losses/dmd")
    assert [(event.step, event.value) for event in found] == [(10, 1.0), (20, 2.0), (30, 2.0), (40, 2.0)]


def test_the_picture_is_kept_pixel_for_pixel(tmp_path):
    picture = sheet(torch.rand(4, 3, 64, 64) * 2 - 1)
    board = TensorBoard(tmp_path)
    board.begin("dmd", 0)
    board.picture(50, picture)
    board.close()
    (event,) = read(tmp_path / "dmd").Images("samples")
    assert event.step == 50
    kept = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    np.testing.assert_array_equal(kept, np.asarray(picture.convert("RGB")))


def test_where_it_is_not_installed_that_is_one_sentence_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(NoTensorBoard, match=r"TensorBoard is not installed .*fastdistill\[watch\]"):
        TensorBoard(tmp_path)
