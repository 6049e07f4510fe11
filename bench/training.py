"""One update of each training method on the bundled digits, against the same update written plainly.

An update is one turn of every role, optimisers and the student's average included. The turns have rows of their own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fastdistill.training import (
    ADDConfig,
    Data,
    DMD2Config,
    DMDConfig,
    Draws,
    InstaFlowConfig,
    LatentData,
    MethodConfig,
    ReflowConfig,
    RoleConfig,
    Setup,
    Stage,
    Teacher,
    TrainerConfig,
)
from fastdistill.training.contract import nudged
from torch import Tensor, nn

from . import accuracy, usage
from .gpu import Gpu
from .plain_training import Clock, LossesByRole, PlainUpdate, TrainerUpdate, WrittenOutDMD
from .rows import Key, Row
from .runner import Job
from .timing import PairTimes, Speed, time_pairs
from .usage import Usage

NAME = "training"
MODEL = "digits-teacher"
BASELINE = "torch"
BATCH = 16
_IMAGES = 64  # real ones, that are encoded once
_TRAINER = TrainerConfig(batch_size=BATCH)
_ROLE = RoleConfig(1e-6, beta1=0.0)  # the networks stay where they are while they are timed
_PAIRS = {"pairs": BATCH, "pair_steps": 2}  # of one step the student knows the ends already


@dataclass(frozen=True)
class Case:
    """A method, and with whom its update is compared.

    Attributes:
        config: of one update of each role per iteration.
        roles: in the order of their turns.
        usual: updates of each role per update of the student, by the method's defaults.
    """

    config: MethodConfig
    roles: tuple[str, ...] = ("student",)
    usual: tuple[int, ...] = (1,)
    plain: Callable[[Stage, Clock], Callable[[], LossesByRole]] = PlainUpdate


_SCORES = ("student", "fake_score")
_FLOW = ReflowConfig(_TRAINER, student=_ROLE, straightness_samples=0, **_PAIRS)
_DIRECT = ReflowConfig(rectifications=0, straightness_samples=0, **_PAIRS)

CASES: dict[str, Case] = {
    "dmd": Case(
        DMDConfig(_TRAINER, student=_ROLE, fake_score=_ROLE, critic_ratio=1, regression_weight=0.0),
        _SCORES,
        (1, DMDConfig().critic_ratio),
        WrittenOutDMD,
    ),
    "dmd2": Case(
        DMD2Config(_TRAINER, student=_ROLE, fake_score=_ROLE, critic_ratio=1), _SCORES, (1, DMD2Config().critic_ratio)
    ),
    "add": Case(
        ADDConfig(_TRAINER, student=_ROLE, discriminator=_ROLE, student_every=1),
        ("student", "discriminator"),
        (1, ADDConfig().student_every),
    ),
    "reflow": Case(_FLOW),
    # The update of the distillation; which flow made its pairs makes no difference to the time.
    "instaflow": Case(InstaFlowConfig(_TRAINER, student=_ROLE, reflow=_DIRECT)),
}


def jobs(device: str, pairs: int, gpu: Gpu | None = None) -> list[Job]:
    """Per method a row of its update and one of each turn: float32, a batch of 16."""
    return [
        Job(keys, BASELINE, lambda method=method, keys=keys: _rows(method, keys, device, pairs, gpu))
        for method, keys in ((method, _keys(method, device)) for method in CASES)
    ]


def _keys(method: str, device: str) -> tuple[Key, ...]:
    turns = [f"{method} {role} turn" for role in CASES[method].roles] if len(CASES[method].roles) > 1 else []
    return tuple(
        Key(NAME, f"{MODEL} x{BATCH}", mode, "float32", "-", "-", device, "fastdistill")
        for mode in (f"{method} update", *turns)
    )


def _rows(method: str, keys: tuple[Key, ...], device: str, pairs: int, gpu: Gpu | None) -> Iterator[Row]:
    case, clocks = CASES[method], [Clock() if gpu is None else Clock(gpu.synchronize) for _ in range(2)]
    ours, plain = (make(stage_of(method, device), clock) for make, clock in zip((TrainerUpdate, case.plain), clocks))
    errors = _errors(ours(), plain(), case.plain(stage_of(method, device, torch.float64), Clock())())
    times = time_pairs([ours], [plain], pairs, clock=time.perf_counter_ns)
    turns = {role: _turn(*clocks, role, pairs) for role in case.roles}
    del ours, plain
    gc.collect()  # the memory of others shall not be freed while this one's is counted
    first = TrainerUpdate(stage_of(method, device), Clock())  # its update makes gradients and optimiser states
    used = usage.on_cpu(first) if gpu is None else Usage(gpu.peak_bytes(first))
    update, *others = keys
    note = _shares(method, case, turns) if others else ""
    yield Row(update, BASELINE, Speed.of(times), accuracy.worst(errors.values()), usage=used, note=note)
    for key, role in zip(others, case.roles):
        yield Row(key, BASELINE, turns[role], errors[role])


def _turn(ours: Clock, plain: Clock, role: str, pairs: int) -> Speed:
    """Of the last updates, which are those that were timed in pairs."""
    return Speed.of(PairTimes(*(tuple(map(float, clock.turns[role][-pairs:])) for clock in (ours, plain))))


def _shares(method: str, case: Case, turns: dict[str, Speed]) -> str:
    spent = {role: count * turns[role].ours_us for role, count in zip(case.roles, case.usual)}
    total = sum(spent.values())
    parts = [
        f"{count} {role} turn{'s' if count > 1 else ''} {100 * spent[role] / total:.0f} %"
        for role, count in zip(case.roles, case.usual)
    ]
    return f"{method}, a student update and the others' turns that go with it by default: {', '.join(parts)}"


def _errors(ours: dict[str, Tensor], plain: LossesByRole, exact: LossesByRole) -> dict[str, accuracy.Accuracy]:
    """Of the losses of the first update, by role."""
    return {
        role: accuracy.compare(ours, plain[role], {name: t.double() for name, t in terms.items()}, torch.float32)
        for role, terms in exact.items()
    }


def stage_of(method: str, device: str, dtype: torch.dtype = torch.float32) -> Stage:
    """The first stage of a method on the digits, all of its networks and batches in `dtype`."""
    teacher = Teacher(MODEL, device)
    conditions, images = _digits(teacher)
    setup = Setup(teacher, tuple(map(str, range(10))), conditions, images)
    stage = next(CASES[method].config.stages(setup))
    if "fake_score" in stage.method.roles:
        nudge(stage.method.roles["fake_score"])
    if dtype == torch.float32:
        return stage
    for network in (*stage.method.roles.values(), teacher.pipeline.vae):
        nn.Module.to(network, dtype)  # diffusers' own `to` warns, here for nothing
    return Stage(stage.name, stage.method, InDtype(stage.data, dtype), stage.trainer, stage.roles)


def _digits(teacher: Teacher) -> tuple[Any, LatentData]:
    from fastdistill.models.digits.data import load_digits
    from fastdistill.models.digits.text import prompt

    digits = load_digits()
    conditions = teacher.encode([prompt(digit) for digit in range(10)])
    images = digits.images[:_IMAGES].expand(-1, 3, -1, -1).to(teacher.device).contiguous()
    captions = digits.labels[:_IMAGES, None].to(teacher.device)
    return conditions, LatentData(teacher.encode_images(images), conditions, captions, images=images)


class InDtype:
    """Data whose batches are in a dtype."""

    def __init__(self, data: Data, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype

    def batch(self, first: int, draws: Draws) -> dict[str, Any]:
        return {name: value.to(self.dtype) for name, value in self.data.batch(first, draws).items()}


def nudge(network: nn.Module) -> None:
    """A fake score that equals its teacher would give a gradient of zero."""
    with nudged(network):
        moved = [parameter.detach().clone() for parameter in network.parameters()]
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), moved):
            parameter.copy_(value)
