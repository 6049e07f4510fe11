"""The trainer on fake tensors: its turns are taken as in a run, its optimisers' steps are not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from fastdistill.optim import states

from ..data import networks_of
from ..economy import bases
from ..memory_plan import RoleMemory, TurnMemory
from ..method import Step, Turn
from ..recipe import Stage
from ..trainer import Trainer
from ..updates import RoleUpdater
from .shapes import FakeMemory
from .teacher import PlannedTeacher


class Rehearsal(Trainer):
    """The trainer of a stage.

    Args:
        teacher: whose pipeline has the parts that are no role's.
        loaded: networks that are neither a role's nor the pipeline's.
    """

    def __init__(self, stage: Stage, teacher: PlannedTeacher, loaded: Iterable[nn.Module]) -> None:
        super().__init__(stage.method, stage.data, stage.trainer, stage.roles, stage=stage.name)
        used = [*self.method.roles.values(), *networks_of(stage.data)]
        parked = teacher.idle(used) if self.config.memory.idle == "cpu" else []
        self._others = [*(part for part in teacher.networks() if part not in parked), *loaded]
        for updater in self.updaters.values():
            updater.step = partial(self._no_step, updater)
            for group in updater.optimizer.param_groups:
                for p in group["params"]:
                    p.register_post_accumulate_grad_hook(self._count_gradient)
        self._memory: FakeMemory | None = None
        self._found: dict[str, TurnMemory] = {}
        self._largest = 0

    def roles(self) -> tuple[RoleMemory, ...]:
        """Every network, and what all others of the stage take together."""
        seen: set[int] = set()
        found = []
        for role, network in self.method.roles.items():
            shared = [p for base in bases(network) for p in base.base_parameters()]
            if any(p.untyped_storage()._cdata not in seen for p in shared):
                found.append(RoleMemory("base", False, sum(p.numel() for p in shared), _bytes(shared, seen)))
            found.append(self._role(role, network, seen))
        rest = [p for network in self._others for p in network.parameters()]
        new = [p for p in rest if p.untyped_storage()._cdata not in seen]
        if new:
            found.append(
                RoleMemory("pipeline", False, sum(p.numel() for p in new), _bytes(_tensors(self._others), seen))
            )
        return tuple(found)

    def _role(self, role: str, network: nn.Module, seen: set[int]) -> RoleMemory:
        trained = role in self.updaters
        own = list(network.parameters())
        figures = [0, 0, 0]
        if trained:
            updater = self.updaters[role]
            average = self.average.network
            figures = [
                sum(p.nbytes for p in own),
                _optimizer_bytes(updater),
                _bytes((*average.parameters(), *average.buffers())) if role == self.student else 0,
            ]
        return RoleMemory(
            role, trained, sum(p.numel() for p in own), _bytes((*own, *network.buffers()), seen), *figures
        )

    def count_resident(self, memory: FakeMemory) -> None:
        """Let `memory` know what stays."""
        networks = [*self.method.roles.values(), self.average.network, *self._others]
        memory.add(_tensors(networks))
        memory.add(p for network in networks for base in bases(network) for p in base.network.parameters())

    def turns(self, memory: FakeMemory, largest: int) -> tuple[TurnMemory, ...]:
        """Of each turn the highest, whichever others come before it in an iteration."""
        self._memory = memory
        for _ in range(2 if largest else 1):  # once more with the highest points known, to look there
            for iteration in self._different_iterations():
                self.iteration = iteration
                with memory:
                    self.iterate()
            self._largest = largest
        return tuple(self._found.values())

    def _different_iterations(self) -> Iterator[int]:
        """The iteration in which all turns are due, and those in which a turn comes after others than before."""
        every = [turn.every for turn in self.method.turns]
        whole = math.lcm(*every)
        seen = set()
        for iteration in (whole - 1, *range(min(whole - 1, max(every)))):
            due = [turn.kind for turn in self.method.turns if (iteration + 1) % turn.every == 0]
            places = {(kind, tuple(due[:index])) for index, kind in enumerate(due)}
            if not places <= seen:
                seen |= places
                yield iteration

    def _take(self, turn: Turn, steps: list[Step]) -> None:
        memory, before = self._memory, self._found.get(turn.kind)
        memory.restart()
        memory.look_at(before.peak_bytes if self._largest else None)
        super()._take(turn, steps)
        if self._largest and memory.live:
            largest = sorted(memory.live, key=lambda each: each.bytes, reverse=True)[: self._largest]
            self._found[turn.kind] = replace(before, largest=tuple(largest))
        elif before is None or memory.peak > before.peak_bytes:
            gradients = memory.gradients_at_peak
            activations = memory.peak - memory.resident - gradients
            self._found[turn.kind] = TurnMemory(turn.kind, memory.peak, gradients, activations)

    def _count_gradient(self, p: Tensor) -> None:
        self._memory.add_gradient(p)

    def _no_step(self, updater: RoleUpdater, loss: Tensor) -> None:
        updater.optimizer.zero_grad(set_to_none=True)
        self._memory.drop_gradients()


def _optimizer_bytes(updater: RoleUpdater) -> int:
    """Of the states that it will have, made on the meta device: one of each kind."""
    bits, known = updater.optimizer.state_bits, {}
    total = 0
    for group in updater.optimizer.param_groups:
        for p in group["params"]:
            kind = (p.shape, p.stride(), p.dtype)
            if kind not in known:
                like = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta")
                known[kind] = sum(t.nbytes for t in states.new_state(like, bits).values())
            total += known[kind]
    return total


def _tensors(networks: Iterable[nn.Module]) -> list[Tensor]:
    return [t for network in networks for t in (*network.parameters(), *network.buffers())]


def _bytes(tensors: Iterable[Tensor], seen: set[int] | None = None) -> int:
    """Of those whose memory was not `seen` before; it is then."""
    seen, total = set() if seen is None else seen, 0
    for t in tensors:
        storage = t.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total
