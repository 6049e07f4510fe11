"""`--ray` and what belongs to it, of every command that can share its work on a Ray cluster."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from .cluster import Cluster, import_ray
from .config import require

Ray = Annotated[
    bool, typer.Option("--ray", help="By workers on a Ray cluster, whose machines share the folders that are named.")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        show_default="local",
        help='"local" starts a cluster of this machine alone; "auto" (which this machine is part of) or HOST:PORT.',
    ),
]
Workers = Annotated[
    int | None,
    typer.Option("--ray-workers", min=1, show_default="as many as there is room for", help="At once, at most."),
]
Cpus = Annotated[
    float | None, typer.Option("--ray-cpus", show_default="1", help="Of a worker; so many threads it has.")
]
Gpus = Annotated[
    float | None,
    typer.Option("--ray-gpus", show_default="1 with --device cuda, else 0", help="Of a worker, also a part of one."),
]
Retries = Annotated[
    int | None,
    typer.Option("--ray-retries", min=0, show_default="10", help="How often a piece of work may lose its worker."),
]


def check_device(device: str) -> None:
    """That Ray's workers can have it."""
    require("device", device, device in ("cpu", "cuda"), "cpu or cuda for a Ray job, which gives each worker its GPU")


def cluster_of(ray: bool, device: str, **options: Any) -> Cluster | None:
    """The cluster that the options name, None without --ray.

    Args:
        device: of every worker.
        options: address, workers, cpus, gpus, retries; None is not given.

    Raises:
        ValueError: what does not go together. ImportError: Ray is not installed.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not ray:
        if given:
            raise ValueError(f"--ray-{next(iter(given))}: needed --ray too")
        return None
    if "RANK" in os.environ:
        raise ValueError("--ray shares the work out itself: needed no torchrun")
    check_device(device)
    import_ray()
    return Cluster(**{"gpus": float(device == "cuda"), **given})
