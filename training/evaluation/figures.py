"""How good a finished student is: the figures of a validation, over more images than one process would make.

Whoever makes a batch makes the same images, and the features of all batches are put together in the batches' order: so
the figures do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastdistill.models import load_pipeline

from ..cluster import Cluster, Work
from ..config import require
from ..interruption import Interruption
from ..ray_options import check_device
from ..sampling import sample_batches, sampler_of
from ..validation import Features, ValidationConfig, features_of, measure, prompts_of
from ..world import World

Report = Callable[[int, int], None]
"""Called with images that are done, and images."""

ITEMS = 64  # of a Ray job: what a lost worker had in hand is made again, and each draws the noise up to its own


def evaluate(
    model: str | Path,
    prompts: Sequence[str],
    config: ValidationConfig,
    *,
    steps: int = 1,
    guidance_scale: float = 1.0,
    device: str | torch.device = "cpu",
    features: Features | None = None,
    world: World | None = None,
    report: Report | None = None,
) -> dict[str, float] | None:
    """The figures of a model's images; of several processes each makes its share, and the first one gets the figures.

    Args:
        model: a bundled name or a pipeline folder, sampled with its own scheduler.
        prompts: what images are made of, evenly spread over them; kind "digits" has its own.
        config: what to measure, of how many images and of which noise.
        steps, guidance_scale: how it is sampled; 1.0 is no guidance.
        device: to compute on.
        features: in place of `config.features`.
        world: the processes, connected so that tensors of the CPU can be sent; this one alone unless given.
        report: called after each batch.

    Returns:
        Figures by name; None in every process but the first.

    Raises:
        ValueError, OSError, ImportError: as `Validator`.
    """
    world = world or World()
    pipeline, texts = _ready(model, prompts, config, steps, device)
    if world.is_first:
        of_batch, figures = measure(config, pipeline, features)
    else:
        of_batch = features_of(config, pipeline, features)
    rows = _rows(config)
    mine: dict[int, Tensor] = {}
    own = range(world.rank, len(rows), world.size)
    for number, images in _batches(pipeline, texts, config, steps, guidance_scale, own):
        mine[number] = of_batch(images)
        if report is not None:
            report(min(world.size * sum(map(len, mine.values())), config.count), config.count)
    found = gathered(mine, rows, world)
    return figures(found) if world.is_first else None


def evaluate_on_ray(
    model: str | Path,
    prompts: Sequence[str],
    config: ValidationConfig,
    *,
    cluster: Cluster | None = None,
    steps: int = 1,
    guidance_scale: float = 1.0,
    device: str = "cpu",
    report: Report | None = None,
) -> dict[str, float]:
    """`evaluate` as a Ray Data job. This process reads the reference, on its CPU, and puts the figures together.

    Args:
        model: that each machine of the cluster can read.
        cluster: where, and what each worker takes of it.
        device: of every worker: cpu, or cuda for the GPU that Ray gives it.

    Raises:
        ValueError, OSError, ImportError, ConnectionError, ClusterError: as `evaluate` and `Cluster.run`.
    """
    check_device(device)
    pipeline, _ = _ready(model, prompts, config, steps, "cpu")
    _, figures = measure(config, pipeline)
    del pipeline
    batches = len(_rows(config))
    per_item = -(-batches // max(ITEMS, 4 * ((cluster and cluster.workers) or 1)))
    arguments = {
        "model": str(Path(model).resolve()) if Path(model).is_dir() else str(model),
        "prompts": tuple(prompts),
        "config": config,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "device": device,
        "per_item": per_item,
    }
    found: dict[int, Tensor] = {}
    # What is half done is of no use: the signals are left alone.
    for row in (cluster or Cluster()).run(
        _prepare, arguments, range(-(-batches // per_item)), Interruption(kept=False)
    ):
        found[int(row["item"])] = torch.from_numpy(np.array(row["features"]))
        if report is not None:
            report(sum(map(len, found.values())), config.count)
    return figures(torch.cat([found[item] for item in sorted(found)]).split(config.batch_size))


def _prepare(
    model: str,
    prompts: tuple[str, ...],
    config: ValidationConfig,
    steps: int,
    guidance_scale: float,
    device: str,
    per_item: int,
) -> Work:
    """A worker; an item is so many batches in a row."""
    pipeline, texts = _ready(model, prompts, config, steps, device)
    of_batch = features_of(config, pipeline)

    def work(item: int) -> dict[str, np.ndarray]:
        own = range(item * per_item, (item + 1) * per_item)
        batches = _batches(pipeline, texts, config, steps, guidance_scale, own)
        return {"features": torch.cat([of_batch(images) for _, images in batches]).numpy()}

    return work


def _ready(model: str | Path, prompts: Sequence[str], config: ValidationConfig, steps: int, device):
    """The pipeline on its device, and a prompt for each image."""
    require("kind", config.kind, config.kind != "none", "digits or reference")
    require("steps", steps, steps >= 1, "1 or more")
    texts = prompts_of(config, prompts)
    return sampler_of(load_pipeline(model).to(device)), texts


def _batches(
    pipeline, texts: list[str], config: ValidationConfig, steps: int, guidance_scale: float, chosen: range
) -> Iterator[tuple[int, Tensor]]:
    options = {"steps": steps, "guidance_scale": guidance_scale, "seed": config.seed}
    return sample_batches(pipeline, texts, batch_size=config.batch_size, chosen=chosen, **options)


def _rows(config: ValidationConfig) -> list[int]:
    """Images of each batch."""
    return [min(config.batch_size, config.count - first) for first in range(0, config.count, config.batch_size)]


def gathered(mine: dict[int, Tensor], rows: Sequence[int], world: World) -> list[Tensor]:
    """In the first process the features of all batches in their order; in the others those of their own.

    Args:
        mine: features (B, D) float64 by number of the batch: those from `world.rank` on in steps of `world.size`.
        rows: B of every batch.
        world: connected by a backend that sends tensors of the CPU.
    """
    own = [mine[number] for number in sorted(mine)]
    if world.size == 1:
        return own
    width = torch.tensor(max((batch.shape[1] for batch in own), default=0))
    dist.all_reduce(width, op=dist.ReduceOp.MAX)  # a process may have no batch
    of_rank = [[rows[number] for number in range(rank, len(rows), world.size)] for rank in range(world.size)]
    sent = torch.zeros(max(map(sum, of_rank)), int(width), dtype=torch.float64)  # gather wants one shape
    if own:
        sent[: sum(map(len, own))] = torch.cat(own)
    received = [torch.empty_like(sent) for _ in range(world.size)] if world.is_first else None
    dist.gather(sent, received)
    if received is None:
        return own
    parts = [iter(all_rows[: sum(sizes)].split(sizes)) for all_rows, sizes in zip(received, of_rank) if sizes]
    return [next(parts[number % world.size]) for number in range(len(rows))]
