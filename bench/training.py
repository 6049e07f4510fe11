"""One DMD update of the bundled digits, student and fake score, against the same update written plainly."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from fastdistill.training import (
    DMD,
    Condition,
    DMDConfig,
    Draws,
    PromptData,
    RoleConfig,
    Teacher,
    Trainer,
    TrainerConfig,
)
from fastdistill.training.config import role_configs
from fastdistill.training.contract import nudged
from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.diffusion import Schedule
from fastdistill.models import load_pipeline

from . import accuracy, usage
from .gpu import Gpu
from .rows import Key, Row
from .runner import Job
from .timing import Speed, time_pairs
from .usage import Usage

NAME = "training"
MODEL = "digits-teacher"
BASELINE = "torch"
_BATCH = 16
_LEARNING_RATE = 1e-6  # the networks stay where they are while they are timed
_ROLE = RoleConfig(_LEARNING_RATE, beta1=0.0)
_CONFIG = DMDConfig(
    TrainerConfig(batch_size=_BATCH), student=_ROLE, fake_score=_ROLE, critic_ratio=1, regression_weight=0.0
)

Losses = dict[str, Tensor]


def jobs(device: str, pairs: int, gpu: Gpu | None = None) -> list[Job]:
    """One row: float32, a batch of 16, one student and one fake-score update, optimisers included."""
    key = Key(NAME, f"{MODEL} x{_BATCH}", "dmd update", "float32", "-", "-", device, "fastdistill")
    return [Job((key,), BASELINE, lambda: _rows(key, device, pairs, gpu))]


def _rows(key: Key, device: str, pairs: int, gpu: Gpu | None) -> Iterator[Row]:
    ours, plain, exact = _ours(device), _plain(device, torch.float32), _plain(device, torch.float64)
    errors = accuracy.compare(ours(), plain(), {name: t.double() for name, t in exact().items()}, torch.float32)
    del exact
    times = time_pairs([_synchronised(ours, gpu)], [_synchronised(plain, gpu)], pairs, clock=time.perf_counter_ns)
    first = _ours(device)  # its update makes gradients and optimiser states, which count
    used = usage.on_cpu(first) if gpu is None else Usage(gpu.peak_bytes(first))
    yield Row(key, BASELINE, Speed.of(times), errors, usage=used)


def _synchronised(update: Callable[[], Losses], gpu: Gpu | None) -> Callable[[], object]:
    def run() -> None:
        update()
        if gpu is not None:
            gpu.synchronize()

    return run


def _ours(device: str) -> Callable[[], Losses]:
    teacher, schedule, condition = _teacher(device, torch.float32)
    teacher.to(memory_format=torch.channels_last)  # as `fastdistill.training.distill` does
    dmd = DMD(teacher, schedule, "v_prediction", _CONFIG)
    _nudge(dmd.fake_score)
    trainer = Trainer(dmd, PromptData(condition, _sample_shape(teacher)), _CONFIG.trainer, role_configs(_CONFIG))

    def update() -> Losses:
        trainer.iterate()
        return {name: trainer.losses[name] for name in ("dmd", "fake_score")}

    return update


def _plain(device: str, dtype: torch.dtype) -> Callable[[], Losses]:
    """The paper's two updates (arXiv 2311.18828, equations 6 to 8) as one would first write them."""
    teacher, schedule, condition = _teacher(device, dtype)
    student, fake_score = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    _nudge(fake_score)
    teacher.requires_grad_(False)
    settings = {"lr": _LEARNING_RATE, "betas": (_ROLE.beta1, _ROLE.beta2), "weight_decay": _ROLE.weight_decay}
    optimizers = [torch.optim.AdamW(network.parameters(), **settings) for network in (student, fake_score)]
    average = [p.detach().clone() for p in student.parameters()]
    steps = len(schedule)
    low, high = int(_CONFIG.min_timestep * steps), int(_CONFIG.max_timestep * steps) + 1

    data = PromptData(condition, _sample_shape(teacher))
    iterations = itertools.count()

    def diffuse(x: Tensor, low: int, high: int, draws: Draws) -> tuple[Tensor, ...]:
        t = draws.randint(low, high)
        noise = draws.randn(*x.shape[1:]).to(x)
        alpha, sigma = (value.to(x).reshape(-1, 1, 1, 1) for value in schedule.at(t))
        return alpha * x + sigma * noise, t, alpha, sigma, noise

    def apply(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), _ROLE.max_grad_norm)
        optimizer.step()

    def update() -> Losses:
        # The numbers that the trainer draws in this iteration.
        draws = Draws(_CONFIG.trainer.seed, next(iterations), 0, batch_size=_BATCH, device=device)
        noise, condition = data.batch(0, draws.fork("data")).values()
        last = torch.full((len(noise),), steps - 1, device=noise.device)
        alpha, sigma = (value.to(noise) for value in schedule.at(steps - 1))
        x = alpha * noise - sigma * student(noise, last, condition.states).sample
        with torch.no_grad():
            x_t, t, alpha, sigma, _ = diffuse(x, low, high, draws.fork("student"))
            real = alpha * x_t - sigma * teacher(x_t, t, condition.states).sample
            fake = alpha * x_t - sigma * fake_score(x_t, t, condition.states).sample
            gradient = (fake - real) / (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)
        loss = 0.5 * F.mse_loss(x, (x - gradient).detach())
        apply(student, optimizers[0], loss)
        with torch.no_grad():
            torch._foreach_lerp_(average, list(student.parameters()), 1 - _CONFIG.trainer.ema_decay)

        x_t, t, alpha, sigma, noise = diffuse(x.detach(), 0, steps, draws.fork("fake_score"))
        fake_loss = F.mse_loss(fake_score(x_t, t, condition.states).sample, alpha * noise - sigma * x.detach())
        apply(fake_score, optimizers[1], fake_loss)
        return {"dmd": loss.detach(), "fake_score": fake_loss.detach()}

    return update


def _teacher(device: str, dtype: torch.dtype) -> tuple[nn.Module, Schedule, Condition]:
    """The UNet, its schedule, and the conditions of a batch of prompts."""
    pipeline = load_pipeline(MODEL, dtype=torch.float32).to(device)
    condition = Teacher(pipeline).encode(["a handwritten seven"] * _BATCH).to(dtype)
    schedule = diffusion.from_scheduler(pipeline.scheduler).to(torch.device(device))
    return nn.Module.to(pipeline.unet, dtype), schedule, condition  # diffusers' own `to` warns, here for nothing


def _sample_shape(network: nn.Module) -> tuple[int, int, int]:
    return network.config.in_channels, network.config.sample_size, network.config.sample_size


def _nudge(network: nn.Module) -> None:
    """A fake score that equals its teacher would give a gradient of zero."""
    with nudged(network):
        moved = [parameter.detach().clone() for parameter in network.parameters()]
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), moved):
            parameter.copy_(value)
