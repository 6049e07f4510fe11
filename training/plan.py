"""What a run will cost, found out by one update of every role of every stage, in memory, with nothing written."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .activations import SavedTensors
from .data import Data
from .draws import Draws
from .economy import restore, shared_by, size_of
from .method import Step, Turn
from .recipe import MethodConfig, Setup, Stage
from .settings import changed, from_settings, leaves
from .teacher import Teacher
from .trainer import Trainer, only

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from rich.console import Group

# Settings that say how much is prepared before an update can be, of which a plan prepares a batch; and those of figures
# that no update needs.
_PREPARED, _MEASURED = "pairs", "straightness_samples"


@dataclass(frozen=True)
class RolePlan:
    """A network of a stage. Bytes are those of its tensors; what several roles share is counted with the first.

    Attributes:
        role, network: its name, and its class.
        updates: optimiser steps planned; None for one that does not train.
        parameters: numbers, not bytes; with those of a base that others share.
        weight_bytes: parameters and buffers.
        gradient_bytes, optimizer_bytes, average_bytes: of the parameters that train; the average is the student's.
        saved_bytes: what the forward pass of one micro-batch keeps for its backward pass, at the batch size of the run.
    """

    role: str
    network: str
    updates: int | None
    parameters: int
    weight_bytes: int
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    average_bytes: int = 0
    saved_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All but the saved activations: what stays between updates, and the gradients."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.average_bytes


@dataclass(frozen=True)
class StagePlan:
    """A stage of the run.

    Attributes:
        updates: of the student.
        samples: that the run takes, those of all roles together.
        preparation_seconds: before the first update, in proportion to the part that was prepared.
        update_seconds: of one student update with the other roles' turns up to it, the first of the process: it
            includes whatever is compiled, cached or allocated once.
        losses: of this update.
    """

    name: str
    updates: int
    samples: int
    preparation_seconds: float
    update_seconds: float
    losses: dict[str, float]
    roles: tuple[RolePlan, ...]

    @property
    def seconds(self) -> float:
        """Expected of the stage, from its one update."""
        return self.preparation_seconds + self.updates * self.update_seconds

    @property
    def bytes(self) -> int:
        """Of all roles, and of the largest backward pass: one role at a time has its turn."""
        return sum(role.bytes for role in self.roles) + max((role.saved_bytes for role in self.roles), default=0)


@dataclass(frozen=True)
class Plan:
    """Of a whole run. That there is one says that every loss moved its own role and no other.

    Attributes:
        parts: bytes of the pipeline's other networks: text encoder, VAE.
        peak_bytes: the most that tensors had on the GPU; None on a CPU, which does not count it.
    """

    method: str
    device: str
    prompts: int
    parts: dict[str, int]
    stages: tuple[StagePlan, ...]
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        stages = [
            asdict(stage) | {"seconds": stage.seconds, "bytes": stage.bytes, "contract": "kept"}
            for stage in self.stages
        ]
        return asdict(self) | {"stages": stages, "seconds": sum(stage.seconds for stage in self.stages)}


def plan(
    teacher: str | Path | DiffusionPipeline | Teacher,
    prompts: Sequence[str],
    config: MethodConfig,
    *,
    images: Data | None = None,
    pairs: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Plan:
    """Prepare and train every stage of a recipe for one update of each role, and say what the whole run needs.

    Arguments are those of `distill`. Nothing is written.

    Raises: as `distill`; GradientContractError where a loss would move another role than its own, or none.
    """
    teacher = Teacher(teacher, device)
    prompts = tuple(prompts)
    on_gpu = teacher.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(teacher.device)
    setup = Setup(teacher, prompts, teacher.encode(prompts), images, None if pairs is None else Path(pairs))
    short, share = _rehearsal(config)
    stages, found, student = short.stages(setup), [], None
    with teacher.shared(config.trainer.memory.rank):
        while True:
            start = time.perf_counter()
            try:
                stage = next(stages) if student is None else stages.send(student)
            except StopIteration:
                break
            prepared = (time.perf_counter() - start) / share
            stage_plan, student = _plan_stage(stage, prepared)
            restore(stage.method)
            found.append(stage_plan)
    parts = {
        name: _bytes([*part.parameters(), *part.buffers()], set())
        for name, part in teacher.pipeline.components.items()
        if isinstance(part, nn.Module) and part is not teacher.unet
    }
    peak = torch.cuda.max_memory_allocated(teacher.device) if on_gpu else None
    return Plan(config.method, str(teacher.device), len(prompts), parts, tuple(found), peak)


def render(plan: Plan) -> Group:
    """The plan as tables for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines: list[Any] = []
    for stage in plan.stages:
        title = f"{plan.method}, stage {stage.name}, on {plan.device}"
        table = Table(title=title, title_justify="left", title_style="", box=None, header_style="bold", pad_edge=False)
        table.add_column("role", no_wrap=True)
        for heading in ("values", "weights", "gradients", "optimiser", "average", "saved", "updates"):
            table.add_column(heading, justify="right", no_wrap=True)
        for role in stage.roles:
            sizes = (role.weight_bytes, role.gradient_bytes, role.optimizer_bytes, role.average_bytes, role.saved_bytes)
            updates = "frozen" if role.updates is None else f"{role.updates}"
            table.add_row(role.role, f"{role.parameters / 1e6:.4g} M", *map(_size, sizes), updates)
        lines += [
            table,
            Text(
                f"{stage.updates} updates of the student, {stage.samples:,} samples; {_size(stage.bytes)} in all "
                "with the largest backward pass.\n"
                f"About {_duration(stage.seconds)}, of which {_duration(stage.preparation_seconds)} before the first "
                f"update: counted from one update, the first, of {stage.update_seconds:.2f} s.\n"
                f"The gradient contract is kept. Losses: {_losses(stage.losses)}.\n"
            ),
        ]
    parts = ", ".join(f"{name} {_size(size)}" for name, size in plan.parts.items())
    lines.append(Text(f"{plan.prompts} prompts. The pipeline's frozen parts: {parts}."))
    if plan.peak_bytes is not None:
        lines.append(Text(f"Peak memory of tensors on {plan.device}: {_size(plan.peak_bytes)}."))
    lines.append(
        Text("Saved: by the forward pass of one micro-batch, for its backward pass. A dry run: nothing was written.")
    )
    return Group(*lines)


def _rehearsal(config: MethodConfig) -> tuple[MethodConfig, float]:
    """The configuration with a batch of what it prepares, and which share of the whole that is."""
    numbers = {name: number for name, number, _, field in leaves(config) if field == _PREPARED and number > 0}
    fewer = {name: min(number, config.trainer.batch_size) for name, number in numbers.items()}
    share = min((fewer[name] / number for name, number in numbers.items()), default=1.0)
    fewer |= {name: 0 for name, _, _, field in leaves(config) if field == _MEASURED}
    return changed(config, **from_settings([f"{name}={number}" for name, number in fewer.items()])), share


def _plan_stage(stage: Stage, prepared: float) -> tuple[StagePlan, nn.Module]:
    """The stage's plan, and the student that it would deliver after one update."""
    turns = {turn.role: turn for turn in reversed(stage.method.turns)}  # a role's first turn, if it has more
    student_every = stage.method.turns[0].every
    rounds = -(-max(turn.every for turn in turns.values()) // student_every)  # until everybody has had a turn
    config = replace(stage.trainer, updates=rounds, report_every=rounds, deliver="last")
    trainer = Trainer(stage.method, stage.data, config, stage.roles, stage=stage.name)
    saved = {role: _saved_bytes(stage, turn) for role, turn in turns.items()}
    run = trainer.run()

    iterations, seen, roles = stage.trainer.updates * student_every, set(), []
    for name, network in stage.method.roles.items():
        trained = [p for p in network.parameters() if name in turns]
        role = RolePlan(
            name,
            type(network).__name__,
            iterations // turns[name].every if name in turns else None,
            size_of(network),
            _bytes([*shared_by(network), *network.parameters(), *network.buffers()], seen),
        )
        if name in turns:
            states = trainer.updaters[name].optimizer.state.values()
            role = replace(
                role,
                gradient_bytes=_bytes(trained),
                optimizer_bytes=_bytes(t for state in states for t in state.values()),
                average_bytes=_bytes(trainer.average.network.parameters()) if name == trainer.student else 0,
                saved_bytes=saved[name],
            )
        roles.append(role)
    samples = iterations * stage.trainer.batch_size * stage.trainer.accumulation
    return (
        StagePlan(stage.name, stage.trainer.updates, samples, prepared, run.seconds / rounds, run.losses, tuple(roles)),
        run.student,
    )


def _saved_bytes(stage: Stage, turn: Turn) -> int:
    """Bytes that the forward pass of one micro-batch keeps for its backward pass."""
    method, trainer = stage.method, stage.trainer
    device = next(next(iter(method.roles.values())).parameters()).device
    draws = Draws(trainer.seed, "plan", batch_size=trainer.batch_size, device=device)
    step = Step(stage.data.batch(0, draws.fork("data")), draws.fork(turn.kind))
    owned = [t for network in method.roles.values() for t in (*network.parameters(), *network.buffers())]
    autocast = torch.autocast(device.type, torch.bfloat16) if trainer.precision == "bfloat16" else nullcontext()
    with torch.random.fork_rng(), only(turn.role, method), SavedTensors(owned) as saved, autocast:
        losses = method.losses(turn.kind, step).whole()
    del losses
    return saved.nbytes


def _bytes(tensors: Iterable[Tensor], seen: set[int] | None = None) -> int:
    """Of the tensors that were not `seen` before, by their place in memory; these are then."""
    total = 0
    for t in tensors:
        place = t.data_ptr()
        if seen is None or place not in seen:
            total += t.nbytes
        if seen is not None:
            seen.add(place)
    return total


def _size(count: int) -> str:
    if count == 0:
        return "-"
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _losses(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
