"""The demo: a teacher in many steps and in one, and its one-step student, drawn, timed and scored.

from fastdistill.demo import render_html, render_sheet, run
result = run()
"""

from .page import render_html
from .result import DemoResult, Row, Training
from .run import run
from .sheet import render_sheet
from .words import summary, warning

__all__ = ["DemoResult", "Row", "Training", "render_html", "render_sheet", "run", "summary", "warning"]
