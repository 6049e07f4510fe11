"""The pairs of a training run: those that the user gave, or made for it."""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from fastdistill.diffusion import Schedule

from ..condition import Condition
from ..pipelines import weights_digest
from .generation import generate
from .load import load_pairs
from .memory import Pairs, make_pairs
from .source import Source, text_digest

if TYPE_CHECKING:
    from ..recipe import Setup

BATCH_SIZE = 250  # of `make_pairs`, and of a shard, so that both solve the same batches; of small samples
_VALUES = 2**17  # of a batch at most: 8 samples of Stable Diffusion at 512 pixels, 2 of SDXL at 1024


def pairs_for(
    setup: Setup,
    *,
    count: int,
    steps: int,
    solver: str = "euler",
    guidance_scale: float = 1.0,
    seed: int = 0,
) -> Pairs:
    """The teacher's pairs: those in `setup.pairs` where the user gave some, whatever was asked for; else made.

    `condition` of the pairs are indices into `setup.conditions`. Made pairs are the same, bit for bit, whether
    `setup.work` keeps them, for a run that is interrupted and for all processes of a run to share, or nothing does.

    Args:
        count, solver, steps, guidance_scale, seed: as in `make_pairs`.

    Raises:
        PairSetError: the set is not whole, of another teacher, or of other prompts.
    """
    teacher = setup.teacher
    if isinstance(setup.pairs, Pairs):
        return setup.pairs
    if setup.pairs is not None:
        return load_pairs(setup.pairs, teacher=teacher, prompts=setup.prompts)
    unconditional = teacher.unconditional if guidance_scale != 1 else None
    return pairs_of(
        setup,
        teacher.unet,
        teacher.schedule,
        teacher.prediction_type,
        count=count,
        steps=steps,
        solver=solver,
        guidance_scale=guidance_scale,
        unconditional=unconditional,
        seed=seed,
    )


def pairs_of(
    setup: Setup,
    network: nn.Module,
    schedule: Schedule,
    prediction_type: str,
    *,
    count: int,
    steps: int,
    solver: str = "euler",
    guidance_scale: float = 1.0,
    unconditional: Condition | None = None,
    seed: int = 0,
) -> Pairs:
    """`pairs_for` of another network than the teacher's, a rectified flow for example: always made."""
    teacher = setup.teacher
    options = {"count": count, "solver": solver, "steps": steps, "guidance_scale": guidance_scale, "seed": seed}
    batch_size = pair_batch_size(teacher.sample_shape)
    if setup.work is None:
        return make_pairs(
            network,
            setup.conditions,
            schedule,
            prediction_type,
            sample_shape=teacher.sample_shape,
            unconditional=unconditional,
            batch_size=batch_size,
            **options,
        )
    source = Source(
        network,
        schedule,
        prediction_type,
        setup.prompts,
        lambda lines: setup.conditions[lines.to(setup.conditions.states.device)],
        setup.conditions[:1] if unconditional is None else unconditional,
        teacher.sample_shape,
        teacher.name,
        weights_digest(network),
        text_digest(teacher),
    )
    pair_set = source.pair_set(**options, shard_size=batch_size, draws="whole")
    # Named after all that the pairs depend on: another run in this folder makes others.
    folder = setup.work / f"pairs-{hashlib.sha256(pair_set.dumps().encode()).hexdigest()[:8]}"
    ended = generate(source, pair_set, folder, batch_size=batch_size).ended
    if ended != "finished":
        signal.raise_signal(signal.Signals[ended])  # as without us, but what is done is kept
    pairs = load_pairs(folder, device=teacher.device)
    return Pairs(pairs.noise[:], pairs.sample[:], pairs.condition)


def pair_batch_size(sample_shape: Sequence[int]) -> int:
    """Pairs that are solved at once: as many as need no more memory than the training does."""
    return max(1, min(BATCH_SIZE, _VALUES // math.prod(sample_shape)))
