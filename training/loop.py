"""The training loop: whose turn it is, on which batch, and what is reported."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import check_gradient_contract, nudged
from .dmd import DMD, DMDConfig
from .pairs import Pairs
from .updates import EMA, RoleUpdater, warm_up_then_decay


@dataclass(frozen=True)
class DMDProgress:
    """What the callback sees.

    Attributes:
        update, total: student updates done and planned.
        seconds: since the first update.
        losses: of the last update: "dmd", "fake_score", "regression" (if used), and "guarded", the share of elements
            whose gradient the guard set to zero.
        student: the network that would be delivered now, in evaluation mode. Look, but do not change it.
    """

    update: int
    total: int
    seconds: float
    losses: dict[str, float]
    student: nn.Module


@dataclass(frozen=True)
class DMDRun:
    """A finished run: the student to deliver (in evaluation mode), updates per role, seconds, last losses."""

    student: nn.Module
    updates: dict[str, int]
    seconds: float
    losses: dict[str, float]


def train(
    dmd: DMD,
    conditions: Tensor,
    sample_shape: tuple[int, ...],
    *,
    pairs: Pairs | None = None,
    callback: Callable[[DMDProgress], bool | None] | None = None,
) -> DMDRun:
    """Train a student. For a diffusers pipeline use `fastdistill.training.distill`, which prepares all of this.

    Args:
        dmd: the roles; its student and fake score are trained in place.
        conditions: (P, L, D) on the networks' device; one is drawn uniformly per sample.
        sample_shape: of one sample, without the batch.
        pairs: for the regression term; needed if its weight is above 0.
        callback: called every `report_every` student updates and after the last one; returning True ends the run.

    Raises:
        GradientContractError: before the first update, if a loss would move another role than its own.
        FloatingPointError: a gradient is not finite; that role is as it was before this update.
    """
    config = dmd.config
    if config.regression_weight > 0 and pairs is None:
        raise ValueError(f"regression_weight {config.regression_weight} needs pairs; got None")
    _check_contract(dmd, conditions, sample_shape)

    generator = torch.Generator().manual_seed(config.seed)
    student = _updater(dmd.student, config, config.learning_rate, config.iterations)
    fake_score = _updater(dmd.fake_score, config, config.critic_learning_rate, config.iterations * config.critic_ratio)
    average = EMA(dmd.student, config.ema_decay)
    losses: dict[str, Tensor] = {}
    start = time.perf_counter()
    while student.updates < config.iterations:
        for turn in range(config.critic_ratio):
            noise, condition = _draw(conditions, sample_shape, config.batch_size, generator)
            # The fake score learns on every batch; the last of them is the student's too.
            if turn == config.critic_ratio - 1:
                x = dmd.generate(noise, condition)
                losses |= _student_turn(dmd, student, x, condition, conditions, pairs, generator)
                average.update(dmd.student)
            else:
                with torch.no_grad():
                    x = dmd.generate(noise, condition)
            fake_loss = dmd.fake_score_loss(x, condition, generator)
            fake_score.step(fake_loss)
            losses["fake_score"] = fake_loss.detach()
        if callback is not None and _is_report(student.updates, config):
            seconds = time.perf_counter() - start
            if callback(DMDProgress(student.updates, config.iterations, seconds, _read(losses), average.network)):
                break
    return DMDRun(
        student=average.network,
        updates={"student": student.updates, "fake_score": fake_score.updates},
        seconds=time.perf_counter() - start,
        losses=_read(losses),
    )


def _student_turn(
    dmd: DMD,
    student: RoleUpdater,
    x: Tensor,
    condition: Tensor,
    conditions: Tensor,
    pairs: Pairs | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    loss, stats = dmd.distribution_loss(x, condition, generator)
    losses = {"dmd": loss.detach(), "guarded": stats.guarded / x.numel()}
    if dmd.config.regression_weight > 0:
        chosen = torch.randint(len(pairs.noise), (len(x),), generator=generator).to(x.device)
        regression = dmd.regression_loss(pairs.noise[chosen], pairs.sample[chosen], conditions[pairs.condition[chosen]])
        losses["regression"] = regression.detach()
        loss = loss + dmd.config.regression_weight * regression
    student.step(loss)
    return losses


def _check_contract(dmd: DMD, conditions: Tensor, sample_shape: tuple[int, ...]) -> None:
    """On a small batch with random numbers of its own, so that a run's own do not depend on this check."""
    generator = torch.Generator().manual_seed(dmd.config.seed)
    noise, condition = _draw(conditions, sample_shape, min(4, dmd.config.batch_size), generator)
    with nudged(dmd.fake_score):  # it starts as the teacher's copy, and equal scores give a gradient of zero
        check_gradient_contract(dmd.roles, dmd.losses_by_owner(noise, condition, generator))


def _draw(
    conditions: Tensor, sample_shape: tuple[int, ...], batch_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random numbers come from the CPU whatever the device: one seed, one run."""
    noise = torch.randn(batch_size, *sample_shape, generator=generator).to(conditions)
    chosen = torch.randint(len(conditions), (batch_size,), generator=generator)
    return noise, conditions[chosen.to(conditions.device)]


def _updater(network: nn.Module, config: DMDConfig, learning_rate: float, updates: int) -> RoleUpdater:
    return RoleUpdater(
        network,
        learning_rate=learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        schedule=warm_up_then_decay(updates, config.warm_up, config.decay),
    )


def _is_report(update: int, config: DMDConfig) -> bool:
    return update % config.report_every == 0 or update == config.iterations


def _read(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in losses.items()}
