"""What `fastdistill models` shows: every architecture and bundled model with its sizes, from configurations alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .architectures import ARCHITECTURES, Architecture, build_networks, resolve_architecture
from .loading import bundled_models

if TYPE_CHECKING:
    from rich.console import RenderableType


def collect() -> list[dict[str, object]]:
    """The facts of each name: those of `ARCHITECTURES`, then the bundled models."""
    architectures = [*ARCHITECTURES.values(), *map(resolve_architecture, bundled_models())]
    return [facts(architecture) for architecture in architectures]


def facts(architecture: Architecture) -> dict[str, object]:
    """Classes, sizes and number of parameters, as JSON writes them; `weights` tells whether the package holds any."""
    return {
        "name": architecture.name,
        "weights": "trained" if architecture.name in bundled_models() else "random",
        "pipeline": architecture.pipeline,
        "resolution": list(architecture.resolution),
        "scheduler": architecture.scheduler.class_name,
        "prediction_type": architecture.prediction_type,
        "parameters": count_parameters(architecture),
    }


def count_parameters(architecture: Architecture) -> dict[str, int]:
    """Parameters of each network, counted without memory for them."""
    import torch

    with torch.device("meta"):
        networks = build_networks(architecture, torch.float32)
    return {name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()}


def render(rows: list[dict[str, object]]) -> RenderableType:
    """A table with a line per name."""
    from rich.table import Table

    networks = list(dict.fromkeys(network for row in rows for network in row["parameters"]))
    table = Table(box=None)
    for heading in ("name", "weights", "pixels", "predicts", "scheduler"):
        table.add_column(heading, no_wrap=True)
    for network in networks:
        table.add_column(network, justify="right", no_wrap=True)
    for row in rows:
        height, width = row["resolution"]
        counts = (f"{row['parameters'][name]:,}" if name in row["parameters"] else "" for name in networks)
        sizes = (f"{height} x {width}", row["prediction_type"], row["scheduler"].removesuffix("Scheduler"))
        table.add_row(row["name"], row["weights"], *sizes, *counts)
    return table
