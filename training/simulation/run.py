"""A run without computing: the method's own stages and the trainer's own turns on fake tensors, and what they take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Data
from ..economy import size_of
from ..memory_choices import choices
from ..memory_plan import MemoryPlan, StageMemory, TurnMemory
from ..pairs import Pairs
from ..pairs.supply import BATCH_SIZE
from ..recipe import MethodConfig, Setup, Stage
from ..settings import changed, from_settings, leaves
from .data import tensors_of
from .fakes import Weightless, converted_in_place
from .gpu_autocast import gpu_autocast
from .networks import with_networks
from .rehearsal import Rehearsal
from .shapes import FakeMemory
from .teacher import PlannedTeacher

# Settings that say how much is prepared before an update can be, of which a batch is, in one step; and how much is
# measured that no update needs.
_PREPARED, _STEPS, _MEASURED = "pairs", "pair_steps", "straightness_samples"


def simulate(
    config: MethodConfig,
    teacher: PlannedTeacher,
    *,
    architecture: str,
    prompts: int,
    images: Data | None = None,
    pairs_given: bool = False,
    held: Sequence[Tensor] = (),
    device: str = "cuda",
    largest: int = 0,
    loop: type[Rehearsal] = Rehearsal,
) -> MemoryPlan:
    """The plan of a run.

    Args:
        teacher: fake; it is used up.
        architecture: what the teacher is called.
        prompts: how many conditions the run holds.
        images: in place of real samples; None where the run has none.
        pairs_given: whether the teacher's pairs are read from a disk as they are needed.
        held: tensors that real samples take on the device.
        device: "cuda" or "cpu", which the plan is for.
        largest: how many of the largest tensors are named at the highest point of each turn.
        loop: that takes the turns; another than the trainer's to compare with.
    """
    with (
        Weightless(teacher.fake),
        converted_in_place(),
        gpu_autocast(device),
        teacher.shared(config.trainer.memory.rank),
    ):
        rehearsed, loaded = with_networks(_rehearsed(config), teacher.fake)
        pairs = _unread_pairs(teacher) if pairs_given else None
        setup = Setup(teacher, ("",) * prompts, teacher.encode([""] * prompts), images, pairs)
        stages = tuple(_stages(rehearsed, setup, loaded, held, _scale(config, rehearsed), largest, loop))
    height, width = (side * teacher.pipeline.vae_scale_factor for side in teacher.sample_shape[1:])
    size, accumulation = config.trainer.batch_size, config.trainer.accumulation
    return MemoryPlan(config.method, architecture, device, size, accumulation, (height, width), stages)


def _stages(
    config: MethodConfig,
    setup: Setup,
    loaded: list[nn.Module],
    held: Sequence[Tensor],
    scale: float,
    largest: int,
    loop: type[Rehearsal],
) -> Iterator[StageMemory]:
    """What every stage takes.

    loaded: networks that are no role's and not the pipeline's.
    scale: how many times as many pairs the run makes as are made here.
    """
    teacher, stages, student = setup.teacher, config.stages(setup), None
    while True:
        memory = FakeMemory(teacher.fake)
        memory.add(_tensors([*teacher.networks(), *loaded, *([student] if student is not None else [])]))
        memory.add([*tensors_of(setup.conditions), *held])
        before = memory.now
        try:
            with memory:
                stage: Stage = next(stages) if student is None else stages.send(student)
                trainer = loop(stage, teacher, loaded)
        except StopIteration:
            return
        prepared = TurnMemory("preparation", memory.peak, 0, memory.peak - before)
        roles, data = trainer.roles(), _data_bytes([stage.data, setup.conditions, *held], scale)
        memory = FakeMemory(teacher.fake)
        trainer.count_resident(memory)
        memory.start(sum(role.resident_bytes for role in roles) + data)
        turns = trainer.turns(memory, largest)
        chosen = choices(stage.trainer, size_of(stage.method.roles[trainer.student]))
        if "decoder" not in stage.method.roles:
            chosen.pop("decode", None)
        yield StageMemory(stage.name, roles, data, (prepared, *turns), chosen)
        student = trainer.average.network


def _rehearsed(config: MethodConfig) -> MethodConfig:
    """The configuration with a batch of what it prepares."""
    numbers = {name: (value, field) for name, value, _, field in leaves(config)}
    fewer = {name: min(value, BATCH_SIZE) for name, (value, field) in numbers.items() if field == _PREPARED}
    fewer |= {name: 1 for name, (_, field) in numbers.items() if field == _STEPS}
    fewer |= {name: 0 for name, (_, field) in numbers.items() if field == _MEASURED}
    return changed(config, **from_settings([f"{name}={number}" for name, number in fewer.items()]))


def _scale(config: MethodConfig, rehearsed: MethodConfig) -> float:
    """How many times as many pairs a run makes as its rehearsal."""
    whole, some = (sum(v for _, v, _, field in leaves(each) if field == _PREPARED) for each in (config, rehearsed))
    return whole / some if some else 1.0


def _unread_pairs(teacher: PlannedTeacher) -> Pairs:
    """One pair, in place of those on a disk."""
    with teacher.fake:
        noise = torch.empty(1, *teacher.sample_shape)
    return Pairs(noise, noise.clone(), torch.zeros(1, dtype=torch.int64))


def _data_bytes(held: Sequence[Any], scale: float) -> int:
    """Of all that data holds, each tensor once; pairs that were made here stand for `scale` times as many."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(held)}
    pairs = [t for each in tensors_of(held, Pairs) for t in each if isinstance(t, Tensor)]
    return int(sum(storages.values()) + (scale - 1) * sum(t.nbytes for t in pairs))


def _tensors(networks: Iterable[nn.Module]) -> list[Tensor]:
    return [t for network in networks for t in (*network.parameters(), *network.buffers())]
