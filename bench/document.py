"""Writes the tables of docs/benchmarks.md from the committed results: `python -m fastdistill.bench.document`.

Only what stands between two markers is replaced. With --check nothing is written, and the exit code is 1 if the page is
not what the results give.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .report import groups, limits_of, missing, notes
from .rows import RESULTS, Row, read_jsonl

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs/benchmarks.md")
BEGIN = "<!-- from here to the next marker: written by `python -m fastdistill.bench.document` -->"
END = "<!-- the end of what is written by a command -->"

_HEADINGS = ("op", "mode", "dtype", "layout", "cache", "provider", "shapes", "median", "worst", "of the limit", "error")
_OURS = ("cuda", "triton", "cpu", "fastdistill")


def page(text: str, results: Sequence[Path]) -> str:
    """`text` with its generated part made anew from results files, a section per file.

    Raises ValueError where the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} must hold the two markers {BEGIN!r} and {END!r}")
    sections = "\n".join(_section(path.parent.name, read_jsonl(path)) for path in results)
    return f"{before}{BEGIN}\n\n{sections}\n{END}{after}"


def _section(name: str, measured: Sequence[tuple[Row, Mapping[str, object]]]) -> str:
    rows = [row for row, _ in measured if row.speed is not None]
    environments = list({str(where): where for _, where in measured}.values())
    lines = [f"### {name}", "", *(f"- {_describe(where)}" for where in environments), ""]
    lines += [_line(_HEADINGS), _line(["---"] * len(_HEADINGS))]
    lines += [_line(_cells(group, members)) for group, members in groups(rows).items()]
    slower = [row for row in rows if row.key.provider in _OURS and row.speed.ratio < 1]
    if slower:
        lines += ["", f"Rows of this package that are slower than the baseline ({len(slower)} of {_count(rows)}):", ""]
        lines += [f"- {' '.join(row.key.group)} {row.key.case}: {row.speed.ratio:.2f}x" for row in slower]
    absent = missing([row for row, _ in measured])
    if absent:
        lines += ["", "Not measured:", "", *(f"- {line}" for line in absent)]
    noted = notes(rows)
    if noted:
        lines += ["", "Notes:", "", *(f"- {line}" for line in noted)]
    return "\n".join(lines) + "\n"


def _count(rows: Sequence[Row]) -> int:
    return sum(row.key.provider in _OURS for row in rows)


def _cells(group: tuple[str, ...], rows: Sequence[Row]) -> list[str]:
    worst = min(rows, key=lambda row: row.speed.ratio)
    shares = [row.percent for row in rows if row.percent is not None]
    failed = sum(row.status == "failed" for row in rows)
    return [
        *group,
        str(len(rows)),
        f"{statistics.median(row.speed.ratio for row in rows):.2f}x",
        f"{worst.speed.ratio:.2f}x ({worst.key.case})",
        f"{statistics.median(shares):.0f} %" if shares else "-",
        f"{failed} beyond its limit" if failed else "ok",
    ]


def _describe(where: Mapping[str, object]) -> str:
    parts = [str(where["device"])]
    if "gpu" in where:
        parts += [f"{name} {where[name]}" for name in ("driver", "cuda", "cudnn", "triton")]
    else:
        parts.append(f"{where['threads']} thread(s), {where['torch_capability']}")
    parts.append(f"torch {where['torch']}, Python {where['python']}, commit {str(where['commit'])[:12]}")
    if where.get("limits"):
        parts.append(f"measured limits: {limits_of(where['limits'])}")
    return "; ".join([*parts, str(where["time"])[:10]])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """The exit code."""
    if [*arguments] not in ([], ["--check"]):
        print("usage: python -m fastdistill.bench.document [--check]", file=sys.stderr)
        return 2
    path = root / PAGE
    results = sorted((root / "bench" / "results").glob(f"*/{RESULTS}"))
    try:
        old = path.read_text()
        new = page(old, results)
    except (OSError, ValueError) as error:
        print(f"error: {error} (this command works in a clone of the repository)", file=sys.stderr)
        return 2
    if arguments:
        if new != old:
            print(f"{PAGE} is not what bench/results gives: python -m fastdistill.bench.document", file=sys.stderr)
        return int(new != old)
    path.write_text(new)
    print(f"{path} written from {len(results)} results file(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
