"""The ablations of adversarial diffusion distillation, repeated in small on the digits.

The rows are those of the paper's table of ablations (arXiv 2311.17042): loss terms, weighting of the distillation,
conditioning of the discriminator, what the student starts from, steps of the teacher, feature network; and what the
digits' defaults have otherwise than the paper. Every row is a run of its own with as many updates as the others.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from fastdistill._output import write_files

from .add import ADDConfig
from .settings import changed, to_dict
from .unet_features import UNET_FEATURES

RANDOM_VIT = "random ViT"
FIGURES = ("fd", "accuracy", "diversity")


@dataclass(frozen=True)
class Row:
    """Of the table: settings that differ from the first row's."""

    group: str
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)


ROWS = (
    Row("as configured", "as configured"),
    Row("loss terms", "adversarial alone", {"distill_weight": 0.0}),
    Row("loss terms", "distillation alone", {"adversarial_weight": 0.0}),
    Row("weighting", "SDS, pixels", {"weighting": "sds"}),
    Row("weighting", "exponential, latents", {"distill_space": "latent"}),
    Row("weighting", "SDS, latents", {"weighting": "sds", "distill_space": "latent"}),
    Row("weighting", "NFSD, latents", {"weighting": "nfsd", "distill_space": "latent"}),
    Row("conditioning", "neither text nor image", {"text_condition": False, "image_condition": False}),
    Row("conditioning", "text", {"text_condition": True, "image_condition": False}),
    Row("conditioning", "image", {"text_condition": False, "image_condition": True}),
    Row("conditioning", "text and image", {"text_condition": True, "image_condition": True}),
    Row("timesteps", "249, 499, 749, 999", {"timesteps": (249, 499, 749, 999)}),
    Row("augmentation", "colour, translation, cutout", {"augmentation": "color,translation,cutout"}),
    Row("turns", "one to one", {"student_every": 1}),
    Row("student", "random weights", {"student_init": "random"}),
    Row("teacher", "2 steps", {"teacher_steps": 2}),
    Row("teacher", "4 steps", {"teacher_steps": 4}),
    Row("features", "random ViT", {"features": RANDOM_VIT}),
    Row("features", "the teacher's UNet, latents", {"features": UNET_FEATURES, "image_condition": False}),
)


def chosen_rows(names: Sequence[str] | None) -> tuple[Row, ...]:
    """The rows of these names or groups, in the table's order; all of them for None or none."""
    known = [row.name for row in ROWS] + [row.group for row in ROWS]
    for name in names or ():
        if name not in known:
            raise ValueError(f"rows: {name!r} is none of the table; known: {', '.join(dict.fromkeys(known))}")
    return tuple(row for row in ROWS if not names or row.name in names or row.group in names)


def ablate(
    out: str | Path,
    *,
    config: ADDConfig | None = None,
    rows: Sequence[Row] = ROWS,
    seeds: Sequence[int] = (0,),
    teacher: str = "digits-teacher",
    device: str | None = None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Train and score every row with every seed; what `out` holds already is not trained again.

    Args:
        out: JSON file, rewritten whole after every run.
        config: of the first row; the number of updates is its `trainer.updates`.
        rows, seeds: of the table, and of training.
        teacher: of the digits.
        report: called before each run with what it is, how many are done, and how many there are.

    Returns:
        What stands in `out`: "settings", and per row and seed the means over three seeds of the noise of "fd",
        "accuracy" and "diversity" of 1000 images in one step, and "seconds" of training.

    Raises:
        ValueError: `out` holds a table of other settings, or is no such table.
    """
    config = config or ADDConfig()
    out = Path(out)
    table = _opened(out, {"config": to_dict(config), "teacher": teacher})
    wanted = [(row, seed) for row in rows for seed in seeds]
    missing = [(row, seed) for row, seed in wanted if str(seed) not in table["rows"].get(row.name, {})]
    if not missing:
        return table

    from .digits import digits_images
    from .teacher import Teacher

    loaded = Teacher(teacher, device)
    images = digits_images(loaded)
    with _random_vit() as random_vit:
        for row, seed in missing:
            report(f"{row.group}: {row.name}, seed {seed}", len(wanted) - len(missing), len(wanted))
            changes = dict(row.changes)
            if changes.get("features") == RANDOM_VIT:
                changes["features"] = random_vit()
            figures = _run(changed(config, **changes, trainer={"seed": seed}), teacher, images, device)
            table["rows"].setdefault(row.name, {})[str(seed)] = figures
            _write(out, table)
    return table


def as_markdown(table: Mapping[str, Any], rows: Sequence[Row] = ROWS) -> str:
    """The table to read: means over the seeds of training, with the lowest and highest where there are several."""
    lines = ["| | | Frechet distance | accuracy | diversity |", "|---|---|---|---|---|"]
    for row in rows:
        runs = list(table["rows"].get(row.name, {}).values())
        if runs:
            cells = [_cell([run[figure] for run in runs]) for figure in FIGURES]
            lines.append(f"| {row.group} | {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    spread = f" ({min(values):.3f} to {max(values):.3f})" if min(values) < max(values) else ""
    return f"{mean(values):.3f}{spread}"


def _run(config: ADDConfig, teacher: str, images: Any, device: str | None) -> dict[str, float]:
    from .digits import digits_prompts, digits_scores
    from .distill import distill

    start = time.perf_counter()
    result = distill(teacher, digits_prompts(), config, images=images, device=device)
    seconds = time.perf_counter() - start
    scores = [scores for _, scores in digits_scores(result.pipeline)]
    return {name: mean(getattr(each, name) for each in scores) for name in FIGURES} | {"seconds": seconds}


def _opened(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    settings = json.loads(json.dumps(settings))
    if not out.exists():
        return {"settings": settings, "rows": {}}
    try:
        table = json.loads(out.read_text(encoding="utf-8"))
        theirs, _ = table["settings"], table["rows"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"--out {out}: is no table of ablations ({error}); needed one, or a new file") from error
    if theirs != settings:
        different = sorted(_flat(theirs).items() ^ _flat(settings).items())
        names = ", ".join(dict.fromkeys(name for name, _ in different))
        raise ValueError(f"--out {out}: holds rows of other settings ({names}); needed the same, or a new file")
    return table


def _flat(values: Mapping[str, Any], place: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{place}{name}.")
        else:
            flat[f"{place}{name}"] = json.dumps(value)
    return flat


def _write(out: Path, table: Mapping[str, Any]) -> None:
    write_files({out: (json.dumps(table, indent=2) + "\n").encode()})


@contextmanager
def _random_vit() -> Iterator[Callable[[], str]]:
    """Within, a function that gives the folder of a ViT like digits-vit that has learned nothing."""
    with tempfile.TemporaryDirectory(prefix="fastdistill-ablation-") as scratch:
        folder = Path(scratch) / "random-vit"

        def made() -> str:
            if not folder.exists():
                import torch

                from fastdistill.models import bundled_networks
                from fastdistill.models.digits.networks import build_vit

                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    build_vit().save_pretrained(folder)
                shutil.copy(bundled_networks()["digits-vit"] / "preprocessor_config.json", folder)
            return str(folder)

        yield made
