"""The report of a run as one HTML page that needs nothing else: pictures, curves, figures, and how it was made."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from html import escape
from pathlib import Path
from typing import Any

from fastdistill import __version__
from fastdistill._style import CSS
from fastdistill.info import collect_versions, machine

from ..settings import to_yaml
from .pictures import COLUMNS
from .plots import TITLES, TOGETHER, described
from .progress import duration, number, size
from .record import GROUPS, Record

PICTURES_SHOWN = 6
"""Of one stage, first and last among them; the others are in the folder."""
ROWS_SHOWN = 12

_CSS = """
.sheet { display: block; width: 100%; height: auto; margin: 0 0 4px; }
.curves { display: flex; flex-wrap: wrap; gap: 12px 24px; }
.curves .wide { flex-basis: 100%; }
.curve { display: block; max-width: 100%; height: auto; margin-top: 12px; }
.lead + .warning { margin-top: 0; }
.figures dd { font-size: 36px; white-space: nowrap; }
.samples { display: grid; gap: 26px; margin-top: 22px; }
.prompts { display: grid; grid-template-columns: repeat(10, 1fr); gap: 4px; font-size: 12px; line-height: 1.3;
  color: var(--soft); padding: 0; margin: 8px 0 0; list-style: none; text-align: center; }
h3 { font-size: 17px; line-height: 1.3; font-weight: 650; margin: 20px 0 0; }
details { margin-top: 16px; }
summary { cursor: pointer; color: var(--soft); }
td:first-child, th:first-child { white-space: normal; }
tbody th { font-size: inherit; color: var(--ink); padding-top: 11px; padding-bottom: 11px; vertical-align: baseline;
  border-bottom: 1px solid var(--line); }
caption { text-align: left; color: var(--soft); font-size: 13.5px; padding-bottom: 4px; }
@media (max-width: 820px) { .prompts { font-size: 9px; } .facts { grid-template-columns: 1fr; } }
@media print { h2, figure { break-inside: avoid; } }
"""


@dataclass
class RunFacts:
    """What the log does not say.

    Attributes:
        config: of the method.
        teacher, teacher_steps: its name, and in how many steps it draws the picture to compare with.
        out: where the student is saved.
        command: what was typed.
        sampling: how the student is sampled, as of a `Method`.
        delivered: of each stage that ended, the update whose student it delivers.
        ended: the error that ended the run; empty if none did.
    """

    config: Any = None
    teacher: str = ""
    teacher_steps: int = 0
    out: str = ""
    command: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    delivered: dict[str, int] = field(default_factory=dict)
    ended: str = ""


@dataclass(frozen=True)
class Shown:
    """A picture: of a stage's student after so many updates, or of the teacher (None)."""

    stage: str
    update: int | None
    path: Path


def render_report(
    records: Sequence[Record],
    facts: RunFacts,
    pictures: Sequence[Shown] = (),
    prompts: Sequence[str] = (),
    plots: Mapping[tuple[str, str], Sequence[bytes]] | None = None,
    left_out: Sequence[str] = (),
) -> str:
    """The page.

    Args:
        records: of the log, one or more, in their order.
        facts: what the log does not say.
        pictures: in the order in which they are shown.
        prompts: of the cells of each picture, row by row.
        plots: the curves of (stage, group) as PNG files, by day and, if there are two, by night.
        left_out: what could not be done, one sentence each.
    """
    stages: dict[str, list[Record]] = {}
    for line in records:
        stages.setdefault(line["stage"], []).append(line)
    title = _headline(stages, facts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastdistill training: {escape(title)}</title>
<style>{CSS}{_CSS}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">fastdistill training</p>
<h1>{escape(title)}</h1>
<p class="lead">{escape(_lead(stages, facts))}</p>
{_warnings(records, facts)}
{_key_figures(stages)}
</header>
{_samples(pictures, prompts, facts)}
{"".join(_curves(stage, lines, plots or {}, len(stages) > 1) for stage, lines in stages.items())}
{_validations(stages)}
{_stages_table(stages)}
{_skipped(stages, left_out)}
{_how_to_sample(facts)}
{_how_it_was_made(facts, records)}
<footer>Made by fastdistill {escape(__version__)}. Every figure here is in log.jsonl beside this page.</footer>
</main>
</body>
</html>
"""


def _headline(stages: Mapping[str, list[Record]], facts: RunFacts) -> str:
    last = [lines[-1] for lines in stages.values()]
    name = getattr(facts.config, "method", None) or " and ".join(stages)
    return f"{name}: {sum(line['update'] for line in last)} updates in {duration(_seconds(stages))}"


def _lead(stages: Mapping[str, list[Record]], facts: RunFacts) -> str:
    of = f" of {facts.teacher}" if facts.teacher else ""
    steps = facts.sampling.get("steps")
    how = f" that needs {steps} step{'' if steps == 1 else 's'}" if steps else ""
    going = [lines[-1] for lines in stages.values() if lines[-1]["update"] < lines[-1]["total"]]
    places = "; ".join(f"{line['stage']} at update {line['update']} of {line['total']}" for line in going)
    return f"A student{of}{how}." + (f" When this was written: {places}." if going else "")


def _warnings(records: Sequence[Record], facts: RunFacts) -> str:
    sentences = []
    if facts.ended:
        sentences.append(f"The run ended with {facts.ended}")
    if strange := dict.fromkeys(name for line in records for name in line["not_finite"]):
        sentences.append(f"Not finite in some reports: {', '.join(strange)}.")
    return "".join(f'<p class="warning">{escape(sentence)}</p>' for sentence in sentences)


def _key_figures(stages: Mapping[str, list[Record]]) -> str:
    entries = []
    last = next(reversed(stages.values()))[-1]
    for name, value in list(last["validation"].items())[:2]:
        entries.append((_shown(value), f"{name} at update {last['validated']}"))
    entries.append((str(last["update"]), f"updates of the student, {_share_skipped(last)}"))
    entries.append((duration(_seconds(stages)), "of training"))
    if last["peak_bytes"] is not None and len(entries) < 4:
        entries.append((size(last["peak_bytes"]), f"of memory at most, of the {last['peak_of']}"))
    cells = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(label)}</dt></div>" for value, label in entries)
    return f'<dl class="figures">{cells}</dl>'


def _samples(pictures: Sequence[Shown], prompts: Sequence[str], facts: RunFacts) -> str:
    if not pictures:
        return ""
    several = len({each.stage for each in pictures if each.update is not None}) > 1
    figures = "".join(_sample(each, prompts, facts, several) for each in _chosen(pictures, facts.delivered))
    heads = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts[:COLUMNS])
    return f"""<section>
<h2>Before and after</h2>
<p class="note">The same prompts and the same noise in every picture.</p>
<ul class="prompts" aria-label="prompts of the columns">{heads}</ul>
<div class="samples">{figures}</div>
</section>
"""


def _sample(shown: Shown, prompts: Sequence[str], facts: RunFacts, several: bool) -> str:
    if shown.update is None:
        caption, who = f"<b>Teacher</b> in {facts.teacher_steps} steps", f"the teacher in {facts.teacher_steps} steps"
    else:
        what = "before its first update" if shown.update == 0 else f"after {shown.update} updates"
        if several:
            what += f" of {shown.stage}"
        if facts.delivered.get(shown.stage) == shown.update:
            what += ", delivered"
        caption, who = f"<b>Student</b> {escape(what)}", f"the student {what}"
    asked = ", ".join(dict.fromkeys(prompts))
    alt = f"{len(prompts)} samples of {who}: {asked}"
    return f"""<figure><figcaption>{caption}</figcaption>
<img class="sheet" alt="{escape(alt)}" src="{_data(shown.path.read_bytes())}"></figure>
"""


def _chosen(pictures: Sequence[Shown], delivered: Mapping[str, int]) -> list[Shown]:
    """Of each stage the first, the last, the one delivered, and some spread between."""
    groups: dict[str, list[Shown]] = {}
    for each in pictures:
        groups.setdefault(each.stage if each.update is not None else "", []).append(each)
    return [
        each
        for group in groups.values()
        for each in group
        if each in _spread(group, PICTURES_SHOWN) or delivered.get(each.stage) == each.update
    ]


def _spread(items: Sequence, count: int) -> list:
    """At most `count` of them, first and last included, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _curves(
    stage: str, lines: Sequence[Record], plots: Mapping[tuple[str, str], Sequence[bytes]], several: bool
) -> str:
    figures = []
    for group in GROUPS:
        if (stage, group) in plots:
            alt = f"Curves of {TITLES[group]} of {stage} over updates of the student. {described(lines, group)}"
            head = "" if group in TOGETHER else f"<h3>{escape(TITLES[group].capitalize())}</h3>"
            wide = "" if group in TOGETHER else ' class="wide"'
            figures.append(f"<div{wide}>{head}{_curve(plots[stage, group], alt)}</div>")
    if not figures:
        return ""
    title = f"Curves of {escape(stage)}" if several else "Curves"
    return f'<section>\n<h2>{title}</h2>\n<div class="curves">{"".join(figures)}</div></section>\n'


def _curve(drawn: Sequence[bytes], alt: str) -> str:
    night = "".join(f'<source media="(prefers-color-scheme: dark)" srcset="{_data(content)}">' for content in drawn[1:])
    return f"""<figure><picture>{night}
<img class="curve" alt="{escape(alt)}" src="{_data(drawn[0])}"></picture></figure>
"""


def _validations(stages: Mapping[str, list[Record]]) -> str:
    parts = []
    for stage, lines in stages.items():
        taken = {line["validated"]: line["validation"] for line in lines if line["validation"]}
        if not taken:
            continue
        best = lines[-1]["best"]
        shown = sorted({*_spread(list(taken), ROWS_SHOWN), *([best] if best in taken else [])})
        names = list(next(iter(taken.values())))
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
        rows = "".join(
            f'<tr{" class=best" if update == best else ""}><th scope="row">{update}'
            f"{' (best)' if update == best else ''}</th>"
            f"{''.join(f'<td>{_shown(taken[update].get(name))}</td>' for name in names)}</tr>"
            for update in shown
        )
        parts.append(
            f'<div class="scroll"><table><caption>{escape(stage)}: the averaged student; lower is better for '
            f"{escape(names[0])}, which decides what is best.</caption><thead><tr>"
            f'<th scope="col">update</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )
    return f"<section>\n<h2>Validation</h2>\n{''.join(parts)}</section>\n" if parts else ""


def _stages_table(stages: Mapping[str, list[Record]]) -> str:
    rows = []
    for stage, lines in stages.items():
        last = lines[-1]
        per_update = last["seconds"] / max(1, last["update"])
        peak = "" if last["peak_bytes"] is None else size(last["peak_bytes"])
        roles = ", ".join(f"{role} {count}" for role, count in last["updates"].items())
        rows.append(
            f'<tr><th scope="row">{escape(stage)}</th><td>{last["update"]} of {last["total"]}</td>'
            f"<td>{escape(roles)}</td><td>{duration(last['seconds'])}</td><td>{per_update:.3g}</td><td>{peak}</td></tr>"
        )
    losses = "".join(
        f'<tr><th scope="row">{escape(stage)}: {escape(name)}</th><td>{_shown(lines[0]["losses"].get(name))}</td>'
        f"<td>{_shown(lines[-1]['losses'].get(name))}</td></tr>"
        for stage, lines in stages.items()
        for name in lines[-1]["losses"]
    )
    return f"""<section>
<h2>The figures</h2>
<div class="scroll"><table><thead><tr><th scope="col">stage</th><th scope="col">updates</th>
<th scope="col">of each role</th><th scope="col">time</th><th scope="col">seconds per update</th>
<th scope="col">peak memory</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>
<div class="scroll"><table><thead><tr><th scope="col">loss</th><th scope="col">first report</th>
<th scope="col">last report</th></tr></thead><tbody>{losses}</tbody></table></div>
</section>
"""


def _skipped(stages: Mapping[str, list[Record]], left_out: Sequence[str]) -> str:
    sentences = [
        f"{stage}: {count} updates of {role} were left out, for a gradient that was not finite or a loss that exploded"
        for stage, lines in stages.items()
        for role, count in lines[-1]["skipped"].items()
        if count
    ] or ["No update was left out."]
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in [*sentences, *left_out])
    return f"<section>\n<h2>What was left out</h2>\n<ul>{items}</ul>\n</section>\n"


def _how_to_sample(facts: RunFacts) -> str:
    if not facts.sampling:
        return ""
    out = facts.out or "my-student"
    steps, guidance = facts.sampling.get("steps", 1), facts.sampling.get("guidance_scale", 1.0)
    code = f"""from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{out}")
pipe("a prompt", num_inference_steps={steps}, guidance_scale={guidance}).images[0].save("picture.png")"""
    command = f'fastdistill generate "a prompt" --model {out} --steps {steps}'
    return f"""<section>
<h2>How to sample it</h2>
<pre><code>{escape(code)}</code></pre>
<pre><code>{escape(command)}</code></pre>
</section>
"""


def _how_it_was_made(facts: RunFacts, records: Sequence[Record]) -> str:
    versions = {name: version for name, version in collect_versions().items() if version}
    this = machine()
    lines = {
        "Teacher": facts.teacher,
        "Software": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Machine": f"{this['processor']}, {this['threads']} of {this['cores']} cores, {this['system']}",
        "GPU": _gpu(),
        "From": records[0]["time"],
        "To": records[-1]["time"],
    }
    terms = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in lines.items() if value)
    command = f"<pre><code>{escape(facts.command)}</code></pre>" if facts.command else ""
    settings = ""
    if is_dataclass(facts.config):
        yaml = f"<pre><code>{escape(to_yaml(facts.config))}</code></pre>"
        settings = f"<details open><summary>Configuration</summary>{yaml}</details>"
    return f"""<section>
<h2>How it was made</h2>
{command}
<dl class="facts">{terms}</dl>
{settings}
</section>
"""


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _seconds(stages: Mapping[str, list[Record]]) -> float:
    return sum(lines[-1]["seconds"] for lines in stages.values())


def _share_skipped(line: Record) -> str:
    count = sum(line["skipped"].values())
    return "none left out" if count == 0 else f"{count} updates left out"


def _shown(value: float | None) -> str:
    return "not finite" if value is None else number(value)


def _data(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
