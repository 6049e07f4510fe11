"""Pairs of noise and the sample that the teacher's deterministic ODE makes of it: targets of the regression loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from fastdistill.diffusion import Schedule

from ..condition import Condition
from ..solvers import check_solver, solve

if TYPE_CHECKING:
    from .load import Rows


class Pairs(NamedTuple):
    """Noises and where the ODE carries them: what a regression term or a reflow learns from.

    Of a set on disk, `noise` and `sample` are read when they are indexed.

    Attributes:
        noise: (N, ...) float32, unit noise, the student's input.
        sample: (N, ...) float32, where the teacher's ODE carries it.
        condition: (N,) int64, index into the conditions (for a pipeline: into the prompts).
    """

    noise: Tensor | Rows
    sample: Tensor | Rows
    condition: Tensor


@torch.no_grad()
def make_pairs(
    teacher: nn.Module,
    conditions: Condition,
    schedule: Schedule,
    prediction_type: str,
    *,
    count: int,
    sample_shape: tuple[int, ...],
    solver: str = "euler",
    steps: int = 25,
    guidance_scale: float = 1.0,
    unconditional: Condition | None = None,
    batch_size: int = 250,
    seed: int = 0,
) -> Pairs:
    """Solve the teacher's ODE from unit noise, in memory: for thousands of pairs. A set on disk: `generate`.

    Args:
        teacher: called as `teacher(x_t, t, encoder_hidden_states=condition, return_dict=False)[0]`.
        conditions: of P prompts; one is drawn uniformly per pair.
        schedule, prediction_type: the teacher's own.
        count: number of pairs N.
        sample_shape: of one sample, without the batch.
        solver, steps, guidance_scale, unconditional: see `fastdistill.training.solvers.solve`.
        batch_size: pairs solved at once; the pairs do not depend on it, save for rounding.
        seed: of noise and conditions.
    """
    check_solver(solver)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *sample_shape, generator=generator)
    chosen = torch.randint(len(conditions), (count,), generator=generator)
    device = conditions.states.device
    noise, chosen = noise.to(device), chosen.to(device)
    options = {"solver": solver, "steps": steps, "guidance_scale": guidance_scale, "unconditional": unconditional}
    samples = [
        solve(teacher, part, conditions[which], schedule, prediction_type, **options)
        for part, which in zip(noise.split(batch_size), chosen.split(batch_size))
    ]
    return Pairs(noise, torch.cat(samples), chosen)
