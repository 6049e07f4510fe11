"""The model card of a student: whose it is, from what and how it was made, how it is sampled."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import fastdistill

from .registry import METHODS

# What the engine runs; it is a room that this one does not import.
_ENGINE_NETWORKS = ("UNet2DConditionModel",)
_ENGINE_SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler")


def student_card(
    name: str, facts: Mapping[str, Any], *, teacher_folder: Path | None = None, command: str | None = None
) -> str:
    """Markdown for the README.md of a student's folder.

    Args:
        name: of the folder.
        facts: what `fastdistill.json` holds (`Distilled.facts`).
        teacher_folder: where the teacher's own card is, which names its licence.
        command: that makes the student again; None for one that was made from Python.
    """
    licence = licence_of(teacher_folder)
    parts = [
        _front_matter(facts["method"], licence),
        f"# {name}",
        f"A text-to-image student that needs {_steps(facts)}, distilled from `{facts['teacher']['name']}` by "
        f"{_title(facts['method'])}.",
        "## Sampling",
        sampling(name, facts),
        "## Method",
        about_method(facts["method"]),
        "## Teacher, data and licence",
        _origin(facts, licence),
        "## Training",
        _training(facts),
        _how(facts, command),
    ]
    return "\n\n".join(parts) + "\n"


def sampling(name: str, facts: Mapping[str, Any]) -> str:
    """How the student is sampled, in words and as two pieces of Python that run beside its folder."""
    how, prompt = facts["sampling"], facts.get("run", {}).get("example") or "a handwritten seven"
    steps, guidance = how["steps"], how.get("guidance_scale", 1.0)
    lines = [f"{_steps(facts).capitalize()} from unit noise at t = {how['timestep']}, {_guidance(guidance)}."]
    lines.append(
        _python(
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{name}")',
            f"images = pipe({prompt!r}, num_inference_steps={steps}, guidance_scale={guidance}).images",
            'images[0].save("image.png")',
        )
    )
    if facts["network"] in _ENGINE_NETWORKS and facts["scheduler"] in _ENGINE_SCHEDULERS:
        lines.append("Or, faster, with this package:")
        lines.append(
            _python(
                "from fastdistill import OneStepPipeline",
                "",
                f'pipe = OneStepPipeline.from_pretrained("{name}")',
                f"images = pipe([{prompt!r}], seed=0, steps={steps}, guidance_scale={guidance})",
                'images[0].save("image.png")',
            )
        )
    return "\n\n".join(lines)


def about_method(method: str) -> str:
    """What a method is called, where it was published, and what it does."""
    if method not in METHODS:
        return f"`{method}`."
    entry = METHODS[method]
    return f"{entry.title} ({', '.join(entry.papers)}). {entry.about}"


def licence_of(folder: Path | None) -> str | None:
    """The licence that the front matter of a folder's README.md names, None where there is none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8") if folder is not None else ""
        front = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        return None
    licence = front.get("license_name") or front.get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) else None


def package_commit() -> str | None:
    """The git commit of this package, with "+ changes" if its files differ from it; None outside of a clone of it."""
    root = Path(fastdistill.__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Tracked: an environment inside of somebody else's repository is no clone of ours.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit} + changes" if commit and changes else commit


def _front_matter(method: str, licence: str | None) -> str:
    front: dict[str, Any] = {} if licence is None else {"license": licence}
    front |= {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["one-step-diffusion", "distillation", method],
    }
    return "---\n" + yaml.safe_dump(front, sort_keys=False) + "---"


def _origin(facts: Mapping[str, Any], licence: str | None) -> str:
    run, teacher = facts.get("run", {}), facts["teacher"]
    prompts = run.get("prompts")
    source = f", from `{prompts}`" if isinstance(prompts, str) else ""
    of_teacher = "the teacher's, unknown here" if licence is None else f"{licence}, as the teacher's card says"
    images, pairs = (run.get("images") or {}).get("source"), run.get("pairs")
    return "\n".join(
        [
            f"- Teacher: `{teacher['name']}`, its UNet's weights SHA-256 `{teacher['unet_sha256']}`.",
            f"- Prompts: {facts['prompts']}{source}.",
            f"- Real images: {f'`{images}`' if images else 'none'}.",
            f"- Pairs of noise and sample: {f'`{pairs}`' if pairs else 'none were given'}.",
            f"- Licence: {of_teacher}. Images and prompts may add terms of their own.",
        ]
    )


def _training(facts: Mapping[str, Any]) -> str:
    rows = ["| role | updates |", "|---|---|", *(f"| {role} | {n} |" for role, n in facts["updates"].items())]
    training = facts.get("training", {})
    figures = {**training.get("losses", {}), **training.get("validation", {}), **facts.get("figures", {})}
    told = [f"{training['seconds']:.0f} s of training."] if "seconds" in training else []
    if figures:
        told.append("At its end: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()) + ".")
    return "\n".join(rows) + ("\n\n" + " ".join(told) if told else "")


def _how(facts: Mapping[str, Any], command: str | None) -> str:
    commit = facts.get("commit")
    made = f"Made with fastdistill {facts['fastdistill']}{f', commit {commit}' if commit else ''}"
    lines = [f"{made}:\n\n```\n{command}\n```" if command else f"{made}, from Python."]
    settings = yaml.safe_dump({"name": facts["method"], **facts["config"]}, sort_keys=False)
    lines.append(f"All settings of the method:\n\n```yaml\n{settings}```")
    return "\n\n".join(lines)


def _title(method: str) -> str:
    title = METHODS[method].title if method in METHODS else method
    return title[:1].lower() + title[1:] if title[1:2].islower() else title


def _steps(facts: Mapping[str, Any]) -> str:
    steps = facts["sampling"]["steps"]
    return "one step" if steps == 1 else f"{steps} steps"


def _guidance(scale: float) -> str:
    return "without guidance" if scale <= 1 else f"with classifier-free guidance {scale}"


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
