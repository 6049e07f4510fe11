"""Seeing a run: a display, a log, TensorBoard, pictures, curves, and a report to keep.

with watch("run", teacher=teacher, prompts=prompts, config=config) as callback:
    distill(teacher, prompts, config, callback=callback)
"""

from .jsonl import Log
from .pictures import Samples, sheet
from .plots import NoMatplotlib, plot, plot_png
from .progress import Display
from .record import Record, record
from .report import RunFacts, render_report
from .tensorboard import NoTensorBoard, TensorBoard
from .watching import Watch, watch

__all__ = [
    "Display",
    "Log",
    "NoMatplotlib",
    "NoTensorBoard",
    "Record",
    "RunFacts",
    "Samples",
    "TensorBoard",
    "Watch",
    "plot",
    "plot_png",
    "record",
    "render_report",
    "sheet",
    "watch",
]
