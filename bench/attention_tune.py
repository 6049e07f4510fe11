"""Measures every backend of attention at the sites and writes the choice table of a device: `fastdistill tune`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastdistill import _output
from fastdistill.ops import attention_table
from fastdistill.ops.attention_sdpa import PLAIN

from . import attention, execution
from .rows import Row
from .runner import DTYPES, PAIRS, Selection

# A choice is made between backends that are called one after the other, on data that the layer before has just written.
_CACHE = "hot"


def tune(
    out: Path | None = None,
    device: str = "cuda",
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("bfloat16", "float16"),
    pairs: int | None = None,
) -> tuple[Path, list[Row]]:
    """Measure, write the table and return its path and the rows.

    Args:
        out: the file; the user's own table of this device by default, which is then used from the next process on.
        device: "cuda", or "cpu".
        shapes: suites or sites of the benchmark ("sd15", "8x1024x77x80"); all by default.
        dtypes: names.
        pairs: samples per row; the benchmark's by default.

    Raises:
        ValueError: unknown names, or no GPU where one is asked for.
        OSError: the file cannot be written; found out before anything is measured.
    """
    if device not in PAIRS:
        raise ValueError(f"--device {device}: cannot measure there; known: {', '.join(PAIRS)}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype}: unknown; known: {', '.join(DTYPES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here, and a table is measured on one; --device cpu measures on the CPU")
    cases = attention.BENCHMARK.select_cases(shapes)
    name = attention_table.device_name(device, 0)
    path = out or attention_table.user_path(name)
    if out is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    _output.check_file(path)
    gpu = execution.open_gpu() if device == "cuda" else None
    backends = tuple(p for p in attention.BENCHMARK.select_providers(None) if p.name != PLAIN)
    selection = Selection(
        attention.BENCHMARK,
        *(cases, backends, ("forward", "full"), tuple(dtypes), attention.BENCHMARK.layouts, (_CACHE,), device),
        pairs or PAIRS[device],
        gpu,
    )
    rows, _ = execution.run(selection.jobs())
    rules = measured_rules(rows)
    if not rules:
        raise ValueError("nothing could be measured; `fastdistill bench attention` says why")
    content = as_json(name, rules)
    attention_table.parse(json.loads(content))
    _output.write_files({path: content.encode()})
    return path, rows


def measured_rules(rows: Sequence[Row]) -> list[dict]:
    """One rule per site, dtype and direction: the backends whose error was within its limit, the fastest first.

    A rule holds half-way (in ratio) to the next sizes that were measured, and no further than from half to twice its
    own, so no two rules hold for one call. The text's 77 keys stand for 65 to 128.
    """
    sites: dict[tuple[_Sizes, str, str], list[Row]] = {}
    for row in rows:
        sites.setdefault((_Sizes(*map(int, row.key.case.split("x"))), row.key.dtype, row.key.mode), []).append(row)
    known = {sizes for sizes, *_ in sites}
    rules = []
    for (sizes, dtype, direction), members in sites.items():
        right = sorted((row for row in members if row.status == "ok"), key=lambda row: row.speed.ours_us)
        if not right:
            continue
        alike = [other for other in known if (other.width, other.text) == (sizes.width, sizes.text)]
        queries = _around(sizes.queries, {other.queries for other in alike})
        keys = [queries[0], min(queries[1], 64) if sizes.keys <= 64 else queries[1]]
        times = ", ".join(f"{row.key.provider} {row.speed.ours_us:.1f} us" for row in right)
        rules.append(
            {
                "D": [sizes.width, sizes.width],
                "N": queries,
                "M": [65, 128] if sizes.text else keys,
                "heads": _around(sizes.heads, {o.heads for o in alike if o.queries == sizes.queries}),
                "dtype": [dtype],
                "direction": [direction],
                "backends": [*(row.key.provider for row in right), PLAIN],
                "reason": f"measured at {right[0].key.case}: {times}",
            }
        )
    return rules


class _Sizes(NamedTuple):
    heads: int
    queries: int
    keys: int
    width: int

    @property
    def text(self) -> bool:
        return self.keys == attention.TEXT_TOKENS


def _around(size: int, measured: set[int]) -> list[int]:
    below = max((math.isqrt(size * other) for other in measured if other < size), default=0)
    above = min((math.isqrt(size * other) for other in measured if other > size), default=2 * size)
    return [max(size // 2, below) + 1, min(2 * size, above)]


def as_json(device: str, rules: Sequence[dict]) -> str:
    """The file: a line per rule. What was not measured is decided by the package's estimates, at the end."""
    estimates = json.loads(attention_table.packaged_path("default").read_text())["rules"]
    estimates = [{**rule, "reason": f"estimate: {rule['reason']}"} for rule in estimates]
    source = f"measured with torch {torch.__version__}, {_CACHE}; estimates where nothing was measured"
    lines = ",\n".join(f"    {json.dumps(rule)}" for rule in (*rules, *estimates))
    head = f'  "device": {json.dumps(device)},\n  "source": {json.dumps(source)},\n'
    return f'{{\n{head}  "rules": [\n{lines}\n  ]\n}}\n'
