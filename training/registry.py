"""The methods by name. A new one is a file of its own and one entry here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from .recipe import MethodConfig


@dataclass(frozen=True)
class Entry:
    """A method, as far as it is known before its file is imported.

    Attributes:
        place: "module:Class" of its configuration.
        title: what it is called.
        papers: "arXiv …" each.
        about: what it does, one or two sentences for its students' cards.
    """

    place: str
    title: str
    papers: tuple[str, ...]
    about: str


METHODS: dict[str, Entry] = {
    "add": Entry(
        ".add:ADDConfig",
        "Adversarial diffusion distillation",
        ("arXiv 2311.17042",),
        "The student is to fool a discriminator over the features of a frozen network, which sees real images, and to "
        "agree with what the teacher makes of its samples once they are noised.",
    ),
    "dmd": Entry(
        ".dmd:DMDConfig",
        "Distribution matching distillation",
        ("arXiv 2311.18828", "arXiv 2405.14867"),
        "The student follows the difference between the teacher's score and that of a fake score, which follows the "
        "student in more updates than the student has. A regression to the ends of the teacher's ODE keeps it from "
        "leaving modes out. No training image is used.",
    ),
    "dmd2": Entry(
        ".dmd2:DMD2Config",
        "Improved distribution matching distillation",
        ("arXiv 2405.14867",),
        "The student follows the difference between the teacher's score and that of a fake score, and is to fool a "
        "discriminator in the middle of the fake score, which sees real images noised. With several steps, each learns "
        "on what the student itself made in those before.",
    ),
    "reflow": Entry(
        ".flow:ReflowConfig",
        "Reflow",
        ("arXiv 2209.03003", "arXiv 2309.06380"),
        "The teacher's flow carries noises to samples; on these pairs a flow with straighter paths is learned, which "
        "few steps can follow.",
    ),
    "instaflow": Entry(
        ".instaflow:InstaFlowConfig",
        "InstaFlow",
        ("arXiv 2309.06380",),
        "The teacher's flow is straightened by reflow first, so that one step can follow it; then a student learns to "
        "make in one step what that flow does in many.",
    ),
}


def config_class(name: str) -> type[MethodConfig]:
    """The class of a method's configuration.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r}: unknown; known are {', '.join(METHODS)}")
    module, _, kind = METHODS[name].place.partition(":")
    return getattr(importlib.import_module(module, __package__), kind)
