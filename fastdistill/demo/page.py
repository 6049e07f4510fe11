"""The demo as one HTML page that needs nothing else: styles and pictures are inside, scripts there are none."""

from __future__ import annotations

import base64
from html import escape

import numpy as np
from PIL import Image

from fastdistill._pictures import png

from .result import DemoResult, Row
from .style import CSS
from .words import definitions, explanation, facts, headline, seconds_and_minutes, significant, warning

DIGITS = 10
WALL_GAP = 6  # pixels: the digits fill their 32 from top to bottom


def render_html(result: DemoResult) -> str:
    """The page for `result`: headline, the rows of digits, a hundred samples, the table, and how it was made."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastdistill: {escape(headline(result))}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<p class="eyebrow">fastdistill demo</p>
<h1>{escape(headline(result))}</h1>
<p class="lead">{escape(explanation(result))}</p>
{_key_figures(result)}
{_warning(result)}
<h2>Ten digits</h2>
<p class="note">Every column starts from the same noise. FD is the Fréchet distance to real digits, the percentage
how many are recognised.</p>
{"".join(_row(row, row is result.student) for row in result.rows)}
{_walls(result)}
<h2>The figures</h2>
{_table(result)}
<div class="definitions">{_definitions(result)}</div>
<h2>How it was made</h2>
<pre>{escape(result.command)}</pre>
<dl class="facts">{"".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts(result).items())}</dl>
<footer>Made by fastdistill {escape(result.versions["fastdistill"])} in {seconds_and_minutes(result.seconds)}.
The real digits are the UCI handwritten digits of E. Alpaydin and C. Kaynak (CC BY 4.0).</footer>
</main>
</body>
</html>
"""


def _key_figures(result: DemoResult) -> str:
    student, untrained = result.student, result.untrained
    entries = (
        (f"{significant(result.speedup)}<small>×</small>", f"faster than the teacher in {result.teacher.steps} steps"),
        (f"{significant(student.median)}<small> ms</small>", "per image, made one at a time"),
        (
            f"{student.scores.fd:.2f}",
            f"Fréchet distance to real digits; the teacher in one step: {untrained.scores.fd:.2f}",
        ),
        (f"{100 * student.scores.accuracy:.1f}<small> %</small>", "recognised as the digit that was asked for"),
    )
    cells = "".join(f"<div><dd>{value}</dd><dt>{label}</dt></div>" for value, label in entries)
    return f'<dl class="figures">{cells}</dl>'


def _warning(result: DemoResult) -> str:
    return f'<p class="warning">{escape(warning(result))}</p>' if warning(result) else ""


def _row(row: Row, best: bool) -> str:
    images = "".join(
        f'<img class="drawn" alt="{digit}" src="{_inline(row.samples[digit])}">' for digit in range(DIGITS)
    )
    return f"""<section class="row{" best" if best else ""}">
<div><h3>{escape(row.title)}</h3><p class="note">{escape(row.note)}</p></div>
<div class="digits">{images}</div>
<div class="time"><div class="figure">{significant(row.median)}</div><div class="unit">ms per image</div>
<div class="unit">FD {row.scores.fd:.2f} · {100 * row.scores.accuracy:.1f} %</div></div>
</section>
"""


def _walls(result: DemoResult) -> str:
    walls = "".join(
        f'<figure><figcaption><b>{escape(row.title)}</b></figcaption><img class="drawn" '
        f'alt="100 digits by {escape(row.title)}" src="{_inline(_wall(row.samples))}"></figure>'
        for row in (result.teacher, result.untrained, result.student)
    )
    return f"""<h2>A hundred of each</h2>
<p class="note">None selected: seeds {result.seed} to {result.seed + 99} in each. In the middle every seed gives nearly
the same picture: an average is easy to read, but people do not write alike.</p>
<div class="walls">{walls}</div>
"""


def _table(result: DemoResult) -> str:
    slowest = max(row.median for row in result.rows)
    lines = []
    for row in result.rows:
        low, median, high = row.milliseconds
        lines.append(
            f"<tr{' class=best' if row is result.student else ''}><td>{escape(row.name)}</td><td>{row.steps}</td>"
            f'<td class="bar"><i style="width:{100 * median / slowest:.1f}%"></i></td>'
            f'<td>{significant(median)}<span class="unit">{significant(low)} to {significant(high)}</span></td>'
            f"<td>{row.scores.fd:.2f}</td><td>{100 * row.scores.accuracy:.1f} %</td>"
            f"<td>{row.scores.diversity:.2f}</td></tr>"
        )
    return f"""<div class="scroll"><table>
<thead><tr><th>Model</th><th>Steps</th><th class="bar"></th><th>Time per image, ms</th><th>Fréchet distance</th>
<th>Recognised</th><th>Diversity</th></tr></thead>
<tbody>{"".join(lines)}</tbody>
</table></div>"""


def _definitions(result: DemoResult) -> str:
    return "".join(f"<div><b>{escape(term)}</b> {escape(text)}</div>" for term, text in definitions(result).items())


def _wall(samples: np.ndarray) -> np.ndarray:
    """(100, 32, 32) to one square: ten columns, one for each digit, with some paper between them."""
    size = 32 + WALL_GAP
    cells = np.zeros((len(samples), size, size), np.uint8)
    cells[:, :32, :32] = samples
    wall = cells.reshape(DIGITS, DIGITS, size, size).transpose(0, 2, 1, 3).reshape(DIGITS * size, DIGITS * size)
    return wall[:-WALL_GAP, :-WALL_GAP]


def _inline(pixels: np.ndarray) -> str:
    """A grey picture as a data: address."""
    return "data:image/png;base64," + base64.b64encode(png(Image.fromarray(pixels))).decode()
