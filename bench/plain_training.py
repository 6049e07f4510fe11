"""Training updates as one writes them: the same turns and numbers, plain PyTorch losses, AdamW, clipping, an average.

And DMD's update written out, networks called and predictions converted by hand.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from fastdistill.training import Draws, RoleConfig, Stage, Step, Trainer
from fastdistill.training.trainer import only
from torch import Tensor, nn

LossesByRole = dict[str, dict[str, Tensor]]
"""The terms of each turn of an update, without gradient."""


def _nothing() -> None:
    pass


@dataclass
class Clock:
    """What the turns of an update took, in nanoseconds, one entry per update. `synchronize` waits for the device."""

    synchronize: Callable[[], None] = _nothing
    turns: dict[str, list[int]] = field(default_factory=dict)

    @contextmanager
    def turn(self, role: str) -> Iterator[None]:
        self.synchronize()
        start = time.perf_counter_ns()
        yield
        self.synchronize()
        self.turns.setdefault(role, []).append(time.perf_counter_ns() - start)


class TrainerUpdate:
    """An iteration of the Trainer, each of its turns timed."""

    def __init__(self, stage: Stage, clock: Clock) -> None:
        self.trainer = _TimedTrainer(stage.method, stage.data, stage.trainer, stage.roles)
        self.trainer.clock, self.clock = clock, clock

    def __call__(self) -> dict[str, Tensor]:
        """The last losses by their names, and what is logged beside them."""
        self.trainer.iterate()
        return dict(self.trainer.losses)


class _TimedTrainer(Trainer):
    clock: Clock

    def _take(self, turn, steps) -> None:
        with self.clock.turn(turn.role):
            super()._take(turn, steps)


class PlainUpdate:
    """The same iteration of a method with the reference of every op, PyTorch's AdamW and clipping, and a lerp."""

    def __init__(self, stage: Stage, clock: Clock) -> None:
        self.stage, self.clock = stage, clock
        self.networks = {role: stage.method.roles[role] for role in stage.roles}
        for role, network in stage.method.roles.items():
            network.requires_grad_(role in self.networks)
        self.optimizers = {role: adamw(self.networks[role], config) for role, config in stage.roles.items()}
        self.student = stage.method.turns[0].role
        self.average = [p.detach().clone() for p in self.networks[self.student].parameters()]
        self.iterations = itertools.count()

    def __call__(self) -> LossesByRole:
        config, method = self.stage.trainer, self.stage.method
        iteration = next(self.iterations)
        device = next(self.networks[self.student].parameters()).device
        draws = Draws(config.seed, iteration, 0, batch_size=config.batch_size, device=device)
        found = {}
        with reference_ops():
            step = Step(self.stage.data.batch(iteration * config.batch_size, draws.fork("data")), draws)
            for turn in method.turns:
                with self.clock.turn(turn.role), only(turn.role, method):
                    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                        terms = method.losses(turn.kind, replace(step, draws=draws.fork(turn.kind))).whole().terms
                    self._apply(turn.role, sum(terms.values()))
                found[turn.role] = {name: value.detach() for name, value in terms.items()}
        return found

    def _apply(self, role: str, loss: Tensor) -> None:
        network = self.networks[role]
        descend(network, self.optimizers[role], loss, self.stage.roles[role].max_grad_norm)
        if role == self.student:
            follow(self.average, network, self.stage.trainer.ema_decay)


@contextmanager
def reference_ops() -> Iterator[None]:
    """Within, every op is served by its few lines of plain PyTorch."""
    name, before = "FASTDISTILL_BACKEND", os.environ.get("FASTDISTILL_BACKEND")
    os.environ[name] = "reference"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def adamw(network: nn.Module, config: RoleConfig) -> torch.optim.AdamW:
    """As torch makes it by default, with a role's settings."""
    betas = (config.beta1, config.beta2)
    parameters = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay)


def descend(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float) -> None:
    """Backward pass, clipping, the optimiser's step."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)
    optimizer.step()


@torch.no_grad()
def follow(average: list[Tensor], network: nn.Module, decay: float) -> None:
    """Move the average towards the network."""
    torch._foreach_lerp_(average, list(network.parameters()), 1 - decay)


class WrittenOutDMD:
    """The paper's two updates (arXiv 2311.18828, equations 6 to 8) as one would first write them.

    Of a v teacher, without guidance and regression; the networks lie in memory as they were loaded.
    """

    def __init__(self, stage: Stage, clock: Clock) -> None:
        method = stage.method
        self.stage, self.clock, self.schedule = stage, clock, method.schedule
        for network in method.roles.values():
            network.to(memory_format=torch.contiguous_format)
        self.teacher, self.student, self.fake_score = (
            method.roles[role] for role in ("teacher", "student", "fake_score")
        )
        self.teacher.requires_grad_(False)
        self.optimizers = {
            role: adamw(method.roles[role].requires_grad_(True), config) for role, config in stage.roles.items()
        }
        self.average = [p.detach().clone() for p in self.student.parameters()]
        self.iterations = itertools.count()

    def __call__(self) -> LossesByRole:
        # The numbers that the trainer draws in this iteration.
        config, steps = self.stage.trainer, len(self.schedule)
        iteration = next(self.iterations)
        device = next(self.student.parameters()).device
        draws = Draws(config.seed, iteration, 0, batch_size=config.batch_size, device=device)
        batch = self.stage.data.batch(iteration * config.batch_size, draws.fork("data"))
        noise, condition = batch["noise"], batch["condition"].states
        with self.clock.turn("student"):
            last = torch.full((len(noise),), steps - 1, device=device)
            alpha, sigma = (value.to(noise) for value in self.schedule.at(steps - 1))
            x = alpha * noise - sigma * self.student(noise, last, condition).sample
            with torch.no_grad():
                settings = self.stage.method.config
                low, high = int(settings.min_timestep * steps), int(settings.max_timestep * steps) + 1
                x_t, t, alpha, sigma, _ = self._diffuse(x, low, high, draws.fork("student"))
                real = alpha * x_t - sigma * self.teacher(x_t, t, condition).sample
                fake = alpha * x_t - sigma * self.fake_score(x_t, t, condition).sample
                gradient = (fake - real) / (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)
            loss = 0.5 * F.mse_loss(x, (x - gradient).detach())
            descend(self.student, self.optimizers["student"], loss, self.stage.roles["student"].max_grad_norm)
            follow(self.average, self.student, config.ema_decay)
        with self.clock.turn("fake_score"):
            x = x.detach()
            x_t, t, alpha, sigma, noise = self._diffuse(x, 0, steps, draws.fork("fake_score"))
            fake_loss = F.mse_loss(self.fake_score(x_t, t, condition).sample, alpha * noise - sigma * x)
            most = self.stage.roles["fake_score"].max_grad_norm
            descend(self.fake_score, self.optimizers["fake_score"], fake_loss, most)
        return {"student": {"dmd": loss.detach()}, "fake_score": {"fake_score": fake_loss.detach()}}

    def _diffuse(self, x: Tensor, low: int, high: int, draws: Draws) -> tuple[Tensor, ...]:
        t = draws.randint(low, high)
        noise = draws.randn(*x.shape[1:]).to(x)
        alpha, sigma = (value.to(x).reshape(-1, 1, 1, 1) for value in self.schedule.at(t))
        return alpha * x + sigma * noise, t, alpha, sigma, noise
