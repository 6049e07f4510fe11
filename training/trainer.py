"""The training loop: whose turn it is, on which batch, and what is kept of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .config import RoleConfig, TrainerConfig
from .contract import check_gradient_contract
from .data import Data
from .draws import Draws
from .economy import economize, shared_by, size_of
from .files import alone
from .interruption import Interruption
from .memory_config import settled
from .method import Losses, Method, Step, Turn
from .progress import Run, TrainingProgress, Validation
from .sharding import gathered, shard, shard_roles
from .updates import EMA, RoleUpdater, warm_up_then_decay
from .world import World

Validate = Callable[[nn.Module], Mapping[str, float]]


class Diverged(FloatingPointError):
    """Too many updates were left out, for gradients that are not finite or losses that explode; the state of before
    them was saved."""


class Trainer:
    """Trains a method's roles on data.

    Args:
        method: roles, turns, losses.
        data: where batches come from.
        config: of the run; what is "auto" there is settled here, by the size of the student.
        roles: of each role that trains.
        folder: where checkpoints go; None keeps none. With a folder, SIGTERM and SIGINT, however often they come, end
            the run after the iteration that it is in, with a checkpoint.
        validate: figures of the averaged student, in evaluation mode; of the first one lower is better. It must not
            depend on torch's global random numbers.
        stage: what the run is called in reports; the method's name unless given.
        settings: what else a checkpoint must agree with, JSON: the method's own settings.
        world: the processes that share every batch; this one alone unless given. The first one writes and validates.
            With `config.sharding` "full" they share the networks too, which stay so: what is delivered is whole, in
            every process.

    An iteration is one pass over the turns: a role whose turn is due is updated once, on `accumulation` micro-batches
    that all due roles of the iteration share.
    """

    def __init__(
        self,
        method: Method,
        data: Data,
        config: TrainerConfig,
        roles: dict[str, RoleConfig],
        *,
        folder: str | Path | None = None,
        validate: Validate | None = None,
        stage: str | None = None,
        settings: Mapping[str, Any] | None = None,
        world: World | None = None,
    ) -> None:
        trained = list(dict.fromkeys(turn.role for turn in method.turns))
        if sorted(roles) != sorted(trained):
            raise ValueError(f"roles: configured are {sorted(roles)}; {method.name} trains {sorted(trained)}")
        self.student = trained[0]
        config = settled(config, size_of(method.roles[self.student]))
        self.method, self.data, self.config = method, data, config
        self.folder = None if folder is None else Path(folder)
        self.validate, self.stage, self.world = validate, stage or method.name, world or World()
        for role, network in method.roles.items():
            network.requires_grad_(role in trained)
        self.settings = dict(settings or {}) | {role: asdict(roles[role]) for role in trained}
        self._owns_folder = False
        # The average is a plain copy: it is delivered.
        self.average = EMA(method.roles[self.student], config.ema_decay)
        economize(method, config.memory, trained)
        self._networks = {role: _architecture(method.roles[role]) for role in trained}
        self._sharded = shard_roles(
            method.roles, trained, self.world, sharding=config.sharding, precision=config.precision
        )
        self._sharded_average = shard(self.average.network, self.world) if self._sharded else None
        self.updaters = {role: self._updater(role, roles[role]) for role in trained}
        self.iteration = 0
        self.samples = 0
        self.seconds = 0.0
        self.losses: dict[str, Tensor] = {}
        self.validation = Validation()

    def run(self, callback: Callable[[TrainingProgress], bool | None] | None = None) -> Run:
        """Train until `config.updates` updates of the student are tried, the callback says so, or a signal comes.

        A callback that has `begin` or `end` has them called too: before the first update, and with what is delivered.

        Raises:
            GradientContractError: before the first update, if a loss term would move another role than its own.
            Diverged: more than `config.most_skipped` updates of a role were left out.
            CheckpointError: a checkpoint could not be written; the folder holds another run's and this one was not
                resumed.
            BlockingIOError: another process trains in the folder.
        """
        ended = "finished"
        with self._alone(), Interruption(kept=self.folder is not None, patient=True) as interruption:
            self._check_contract()
            self._tell(callback, "begin")
            while not self.world.any(interruption.requested is not None) and not self._is_finished:
                self.iterate()
                improved = self._is_due(self.config.validate_every, at_the_end=True) and self._validate()
                if self._is_due(self.config.report_every, at_the_end=True):
                    self._stop_if_diverged()
                    with self._average_gathered():
                        wanted = callback is not None and bool(callback(self.progress()))
                    if self.world.any(wanted):
                        ended = "callback"
                        break
                if improved or self._is_due(self.config.checkpoint_every):
                    self.save()
            self.save()
            if self.world.any(interruption.requested is not None):
                ended = interruption.requested or "SIGTERM"
        if self.config.deliver == "best" and self.validation.average is not None:
            self.average.network.load_state_dict(self.validation.average)
        self._tell(callback, "end")
        found = self.validation
        losses = self._read_losses()
        student = self.average.network if self._sharded_average is None else self._sharded_average.whole()
        return Run(student, self._updates(), self.seconds, losses, ended, found.figures, found.best)

    @property
    def _is_finished(self) -> bool:
        return self.updaters[self.student].attempts >= self.config.updates

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """In the folder: no other process, and no other run's checkpoints, which would be taken for this one's."""
        if self.folder is None or not self.world.is_first:
            yield
            return
        if not self._owns_folder and checkpoint.there_are(self.folder):
            raise checkpoint.CheckpointError(f"{self.folder}: holds checkpoints; needed resume, or another folder")
        self._owns_folder = True
        with alone(self.folder):
            yield

    def _tell(self, callback: object, moment: str) -> None:
        told = getattr(callback, moment, None)
        frozen = {role: each for role, each in self._sharded.items() if role not in self.updaters}
        with self._average_gathered(), gathered(frozen.values()):
            if told is not None:
                told(self.progress())

    def _average_gathered(self) -> AbstractContextManager:
        """Within, the first process alone can call the average."""
        return nullcontext() if self._sharded_average is None else self._sharded_average.gathered()

    def iterate(self) -> None:
        """One iteration: every turn that is due, on the same micro-batches."""
        start = time.perf_counter()
        due = [turn for turn in self.method.turns if (self.iteration + 1) % turn.every == 0]
        steps = [self._step(index) for index in range(self.config.accumulation)]
        for turn in due:
            self._take(turn, steps)
        for network in self._sharded.values():
            network.end_iteration()
        self.samples += self._batch * self.config.accumulation
        self.iteration += 1
        self.seconds += time.perf_counter() - start

    def _take(self, turn: Turn, steps: list[Step]) -> None:
        total: Tensor | float = 0.0
        with only(turn.role, self.method):
            for step in steps:
                for losses in self._parts(turn, step):
                    loss = sum(losses.terms.values()) / len(steps)
                    loss.backward()
                    total = total + loss.detach()
                    self.losses |= {name: value.detach() for name, value in (losses.terms | losses.logs).items()}
                    del losses, loss  # with their graph, before the next part's is made
        self.updaters[turn.role].step(total)

    def _parts(self, turn: Turn, step: Step) -> Iterator[Losses]:
        """The losses of a turn, each computed when the one before is done with."""
        compute: Callable[[], Losses] | None = partial(self.method.losses, turn.kind, _at(step, turn.kind))
        while compute is not None:
            with torch.autocast(step.draws.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
                losses = compute()
            compute = losses.then
            yield losses
            del losses

    def save(self) -> Path | None:
        """Write a checkpoint of the run as it stands. Resuming it continues as if nothing had happened.

        None where there is no folder. All processes call this, and leave it when it is written.
        """
        path = None
        if self.folder is not None:
            keep, best = self.config.keep_checkpoints, self.validation.best_iteration
            state, world = self.state(), self.world
            path = checkpoint.save(self.folder, self.iteration, state, keep=keep, best=best, world=world)
        return path

    def resume(self) -> int | None:
        """Continue from the newest whole checkpoint: the student's updates so far, or None where there is none.

        Raises:
            CheckpointError: every checkpoint is damaged, or the newest is of another method, network or configuration;
                what differs is listed.
        """
        found = None
        if self.folder is not None:
            found = checkpoint.load_newest(self.folder, like=self._like(), world=self.world)
        if found is None:
            return None
        self.load_state(found[1])
        return self.updaters[self.student].attempts

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, by part; what `load_state` takes."""
        state: dict[str, Any] = {
            "identity": self._identity(),
            "counters": {"iteration": self.iteration, "samples": self.samples, "seconds": self.seconds},
            "random": checkpoint.random_state(),
            "average": self.average.network.state_dict(),
            "validation": dict(vars(self.validation)),
            "losses": dict(self.losses),
        }
        for role, updater in self.updaters.items():
            state[role] = self.method.roles[role].state_dict()
            state[f"{role}.optimizer"] = updater.state_dict()
        return state

    def _like(self) -> dict[str, Any]:
        """Of the form of `state`, to tell how its tensors are sharded."""
        average = self.average.network.state_dict()
        like: dict[str, Any] = {"average": average, "validation": {"average": average}}
        for role, updater in self.updaters.items():
            like[role] = self.method.roles[role].state_dict()
            like[f"{role}.optimizer"] = updater.like()
        return like

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError, before anything is changed, if the state is another run's."""
        different = _differences(state["identity"], self._identity())
        different = [_how_to_fit(each, self.config, self.world) for each in different]
        for role in self.updaters:
            found = _shapes(state.get(role, {})), _shapes(self.method.roles[role].state_dict())
            different += _differences(*found, f"{role}.")
        if different:
            more = f"; and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
            raise checkpoint.CheckpointError(
                f"the checkpoint is of another run: {'; '.join(different[:SHOWN])}{more}; needed its settings, or "
                "another folder"
            )
        for role, updater in self.updaters.items():
            self.method.roles[role].load_state_dict(state[role])
            updater.load_state_dict(state[f"{role}.optimizer"])
        self.average.network.load_state_dict(state["average"])
        self.validation = Validation(**state["validation"])
        counters = state["counters"]
        self.iteration, self.samples, self.seconds = (counters[name] for name in ("iteration", "samples", "seconds"))
        self.losses = {name: value.to(_device(self.method.roles)) for name, value in state["losses"].items()}
        checkpoint.restore_random_state(state["random"])
        self._owns_folder = True

    def progress(self) -> TrainingProgress:
        """The run as it stands; waits for the device."""
        device = _device(self.method.roles)
        norms = {role: updater.optimizer.grad_norm for role, updater in self.updaters.items()}
        return TrainingProgress(
            self.stage,
            self.updaters[self.student].attempts,
            self.config.updates,
            self.seconds,
            self._read_losses(),
            self._updates(),
            {role: updater.skipped for role, updater in self.updaters.items()},
            self.average.network,
            {role: updater.current_learning_rate for role, updater in self.updaters.items()},
            {role: float(norm) for role, norm in norms.items() if norm is not None},
            dict(self.validation.figures),
            self.validation.update,
            self.validation.best,
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            self.method,
        )

    @property
    def _batch(self) -> int:
        """Samples of a micro-batch over all processes."""
        return self.config.batch_size * self.world.size

    def _draws(self, *place: int | str, batch_size: int) -> Draws:
        device, world = _device(self.method.roles), self.world
        return Draws(self.config.seed, *place, batch_size=batch_size, device=device, rank=world.rank, world=world.size)

    def _validate(self) -> bool:
        """Whether the averaged student is the best so far."""
        if self.validate is None:
            return False
        figures: dict[str, float] = {}
        with self._average_gathered():
            if self.world.is_first:
                with torch.random.fork_rng(), torch.no_grad():
                    figures = {name: float(value) for name, value in self.validate(self.average.network).items()}
            figures = self.world.gather(figures)[0]
        self.validation.add(
            self.updaters[self.student].attempts,
            self.iteration,
            figures,
            self.average.network if self.config.deliver == "best" else None,
        )
        return self.validation.best_iteration == self.iteration

    def _step(self, index: int) -> Step:
        draws = self._draws(self.iteration, index, batch_size=self.config.batch_size)
        return Step(self.data.batch(self.samples + index * self._batch, draws.fork("data")), draws)

    def _updater(self, role: str, config: RoleConfig) -> RoleUpdater:
        # The student takes its turn in every `every`-th iteration; the others' schedules run on their own updates.
        iterations = self.config.updates * self.method.turns[0].every
        planned = sum(iterations // turn.every for turn in self.method.turns if turn.role == role)
        return RoleUpdater(
            self.method.roles[role],
            learning_rate=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            state_bits=8 if self.config.memory.optimizer == "8bit" else 32,
            schedule=warm_up_then_decay(planned, config.warm_up, config.decay, config.decay_shape, config.lowest),
            explosion=self.config.explosion,
            average=self.average if role == self.student else None,
            world=self.world,
        )

    def _check_contract(self) -> None:
        """On a small batch with numbers of its own; no weight, buffer or generator is different afterwards."""
        draws = self._draws("contract", batch_size=min(4, self.config.batch_size))
        step = Step(self.data.batch(0, draws.fork("data")), draws)
        with torch.random.fork_rng(), _untouched_buffers(self.method), self.method.probing():
            for turn in self.method.turns:
                # Around the backward pass too, which may compute blocks again.
                with only(turn.role, self.method):
                    check_gradient_contract(
                        self.method.roles, self._terms(turn, step), flat=self.iteration > 0, anywhere=self.world.any
                    )

    def _terms(self, turn: Turn, step: Step) -> dict[str, tuple[str, Callable[[], Tensor]]]:
        def compute(wanted: str | None = None) -> dict[str, Tensor]:
            terms: dict[str, Tensor] = {}
            # With an empty memo: what an earlier turn left there would hide how the sample is made.
            for losses in self._parts(turn, replace(step, memo={})):
                if wanted in losses.terms:
                    return losses.terms
                terms |= losses.terms
            return terms

        def one(name: str) -> Callable[[], Tensor]:
            return lambda: compute(name)[name]

        with torch.no_grad():
            names = list(compute())
        return {name: (turn.role, one(name)) for name in names}

    def _is_due(self, every: int, at_the_end: bool = False) -> bool:
        """After every so many updates of the student, and after the last one if asked for; 0 for the last alone."""
        attempts = self.updaters[self.student].attempts
        taken_now = self.iteration % self.method.turns[0].every == 0
        regular = every > 0 and attempts % every == 0
        return taken_now and (regular or (at_the_end and attempts == self.config.updates))

    def _stop_if_diverged(self) -> None:
        for role, updater in self.updaters.items():
            if updater.skipped > self.config.most_skipped:
                self.save()
                raise Diverged(
                    f"{role}: {updater.skipped} updates were left out for losses that explode or gradients that are "
                    f"not finite (most_skipped {self.config.most_skipped}); the networks are as they were before: a "
                    "larger most_skipped, with a lower learning_rate, goes on from there"
                )

    def _updates(self) -> dict[str, int]:
        return {role: updater.updates for role, updater in self.updaters.items()}

    def _read_losses(self) -> dict[str, float]:
        of_data = getattr(self.data, "figures", dict)()
        return {name: float(value) for name, value in self.losses.items()} | of_data

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        config = _without(asdict(self.config), (*_FREE, *_OF_PROCESSES))
        # The rest of it changes where numbers are kept, and nothing but their rounding.
        config["memory"] = {name: config["memory"][name] for name in ("roles", "optimizer")}
        return {
            "method": self.method.name,
            "facts": self.method.facts(),
            "turns": {turn.kind: turn.every for turn in self.method.turns},
            "config": config,
            _SAMPLES: self.config.batch_size * self.config.accumulation * self.world.size,
            "settings": _without(self.settings, _FREE_OF_A_ROLE),
            "networks": self._networks,
        }


# Settings that a resumed run may change.
_FREE = ("updates", "report_every", "checkpoint_every", "keep_checkpoints", "most_skipped", "explosion")
_FREE += ("validate_every", "deliver")
_FREE_OF_A_ROLE = ("learning_rate",)
# Of a number of processes: what must agree is the batch over all of them and their micro-batches.
_OF_PROCESSES = ("batch_size", "accumulation", "sharding")
_SAMPLES = "samples per update"
SHOWN = 5
"""Differences that the refusal of a checkpoint lists."""


@contextmanager
def only(role: str, method: Method) -> Iterator[None]:
    """Within, no parameter of another role requires a gradient: a critic passes it on and receives none."""
    others = [turn.role for turn in method.turns if turn.role != role]
    for other in others:
        method.roles[other].requires_grad_(False)
    try:
        yield
    finally:
        for other in others:
            method.roles[other].requires_grad_(True)


@contextmanager
def _untouched_buffers(method: Method) -> Iterator[None]:
    kept = [(buffer, buffer.clone()) for network in method.roles.values() for buffer in network.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def _at(step: Step, role: str) -> Step:
    return replace(step, draws=step.draws.fork(role))


def _device(roles: dict[str, nn.Module]) -> torch.device:
    return next(iter(next(iter(roles.values())).parameters())).device


def _architecture(network: nn.Module) -> dict[str, list]:
    """Class, and how many parameters of how many values: enough to tell networks apart, short enough to read."""
    sizes = [p.numel() for p in network.parameters()]
    found = {"class": type(network).__name__, "parameters": len(sizes), "values": sum(sizes)}
    base = sum(p.numel() for p in shared_by(network))
    return found | ({"base": base} if base else {})


def _shapes(state: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def _without(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """As JSON gives it back; without these names on any level."""
    return {
        name: _without(value, names) if isinstance(value, Mapping) else list(value) if type(value) is tuple else value
        for name, value in settings.items()
        if name not in names
    }


def _differences(theirs: dict, ours: dict, place: str = "") -> list[str]:
    found = []
    for key in sorted({*theirs, *ours}, key=str):
        name, a, b = f"{place}{key}", theirs.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name} is {a!r} in the checkpoint and {b!r} here")
    return found


def _how_to_fit(difference: str, config: TrainerConfig, world: World) -> str:
    """With what it takes, where the difference is one of processes."""
    match = re.fullmatch(rf"{_SAMPLES} is (\d+) in the checkpoint and (\d+) here", difference)
    if match is None:
        return difference
    each, rest = divmod(int(match[1]), world.size * config.accumulation)
    here = f"processes {world.size} x batch_size {config.batch_size} x accumulation {config.accumulation}"
    needed = f"batch_size {each}" if rest == 0 else f"a number of processes x accumulation that divides {match[1]}"
    return f"{difference} ({here}): needed {needed}"
