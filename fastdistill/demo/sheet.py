"""The demo as one picture: the rows of digits and their figures, on paper, at twice the usual pixel density.

Set in the font that Pillow carries, which is the same on every machine and knows ASCII only.
"""

from __future__ import annotations

from functools import cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .result import DemoResult, Row
from .words import headline, significant, warning

PAPER, INK, SOFT, LINE, ACCENT = "#faf7f1", "#1d1b17", "#6d665a", "#ddd5c6", "#b5371f"
WIDTH, MARGIN = 2000, 96
DIGIT, PITCH = 96, 124  # one digit is 3 times its 32 pixels; some paper between them
LINES, LEADING = 2, 110  # two of every digit, to show whether they differ
LABEL = 330  # where the digits begin, from the margin
TOP, ROW, BOTTOM = 300, 264, 156


def render_sheet(result: DemoResult) -> Image.Image:
    """A picture in 256 colours, 2000 pixels wide; its height grows with the number of rows."""
    sheet = Image.new("RGB", (WIDTH, TOP + ROW * len(result.rows) + BOTTOM), PAPER)
    draw = ImageDraw.Draw(sheet)
    _heading(draw, result)
    for index, row in enumerate(result.rows):
        _row(sheet, draw, TOP + index * ROW, row, row is result.student)
    _foot(draw, sheet.height - BOTTOM, result)
    return sheet.quantize(256, dither=Image.Dither.NONE)  # two colours and their mixtures: nothing is lost


def _heading(draw: ImageDraw.ImageDraw, result: DemoResult) -> None:
    draw.text((MARGIN, 138), headline(result), INK, _font(80), anchor="ls")
    _lines(
        draw,
        (MARGIN, 200),
        f"The same noise in every row. The student draws {significant(result.speedup)} times as fast as its teacher in "
        f"{result.teacher.steps} steps,\nwhich, hurried to one step, can only draw the average of every such digit.",
        SOFT,
        30,
    )


def _row(sheet: Image.Image, draw: ImageDraw.ImageDraw, top: int, row: Row, best: bool) -> None:
    middle = top + ROW // 2
    colour = ACCENT if best else INK
    draw.line((MARGIN, top, WIDTH - MARGIN, top), LINE, 2)
    draw.text((MARGIN, middle - 20), row.name, colour, _font(36), anchor="ls")
    draw.text((MARGIN, middle + 20), f"{row.steps} step{'s' if row.steps > 1 else ''}", colour, _font(30), anchor="ls")
    draw.text((MARGIN, middle + 56), row.note, SOFT, _font(21), anchor="ls")
    first = middle - ((LINES - 1) * LEADING + DIGIT) // 2
    for sample in range(10 * LINES):
        line, digit = divmod(sample, 10)
        _draw_ink(sheet, row.samples[sample], MARGIN + LABEL + digit * PITCH, first + line * LEADING)
    right = WIDTH - MARGIN
    draw.text((right, middle - 16), f"{significant(row.median)} ms", colour, _font(48), anchor="rs")
    figures = f"FD {row.scores.fd:.2f} · {100 * row.scores.accuracy:.1f} %"
    draw.text((right, middle + 26), figures, SOFT, _font(24), anchor="rs")
    draw.text((right, middle + 60), f"diversity {row.scores.diversity:.2f}", SOFT, _font(24), anchor="rs")


def _draw_ink(sheet: Image.Image, pixels, left: int, top: int) -> None:
    """The model draws white ink on black; here the ink alone is laid on the paper."""
    ink = Image.fromarray(pixels).resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)
    sheet.paste(ImageOps.colorize(ink, PAPER, INK), (left, top))


def _foot(draw: ImageDraw.ImageDraw, top: int, result: DemoResult) -> None:
    machine = result.machine
    draw.line((MARGIN, top, WIDTH - MARGIN, top), LINE, 2)
    _lines(
        draw,
        (MARGIN, top + 46),
        f"FD: Frechet distance of {result.images} images to the 1797 real digits; 0 is indistinguishable. "
        "%: recognised as the digit that was asked for. Diversity: 1 is as varied as real ones.\n"
        f"ms: per image, median of {result.timed} made one at a time on {machine['device']} "
        f"({machine['processor']}, {machine['threads']} of {machine['cores']} cores). {warning(result)}\n"
        f"Made by: {result.command}",
        SOFT,
        21,
    )


def _lines(draw: ImageDraw.ImageDraw, position: tuple[int, int], text: str, colour: str, size: int) -> None:
    draw.multiline_text(position, text, colour, _font(size), spacing=size * 0.45, anchor="ls")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
