"""The memory table of the documentation: `python -m fastdistill.bench.plans`, a line per `fastdistill plan` command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import typer
from fastdistill.training import plan_memory
from fastdistill.training.memory_plan import CARDS, GIB, MemoryPlan
from fastdistill.training.plan_command import planned_config

_LPIPS = ("regression=lpips", "lpips_backbone=vgg16")
_PLAIN = (
    "trainer.memory.frozen=float32",
    "trainer.memory.decode=plain",
    "trainer.memory.idle=device",
)


@dataclass(frozen=True)
class Line:
    """A plan: the options of its command."""

    method: str
    architecture: str
    batch: int
    roles: str = "full"
    optimizer: str | None = None
    checkpointing: str | None = None
    settings: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What is typed for it."""
        words = ["fastdistill", "plan", self.method, "--arch", self.architecture, "--batch", str(self.batch)]
        words += ["--roles", self.roles] if self.roles != "full" else []
        words += ["--optimizer", self.optimizer] if self.optimizer else []
        words += ["--checkpointing", self.checkpointing] if self.checkpointing else []
        return shlex.join([*words, *(word for setting in self.settings for word in ("--set", setting))])

    def plan(self) -> MemoryPlan:
        """At the size that the UNet was made for."""
        config = planned_config(
            self.method,
            self.settings,
            batch=self.batch,
            roles=self.roles,
            optimizer=self.optimizer,
            checkpointing=self.checkpointing,
        )
        return plan_memory(config, self.architecture)


def lines(architecture: str) -> Iterator[Line]:
    """From the plainest to the leanest, and what fits more samples."""
    large = architecture == "sdxl"
    yield Line("dmd2", architecture, 1, optimizer="float32", checkpointing="none", settings=_PLAIN)
    yield Line("dmd2", architecture, 1, optimizer="float32", checkpointing="none")
    yield Line("dmd2", architecture, 1, checkpointing="none")
    yield Line("dmd2", architecture, 1, checkpointing="recompute")
    yield Line("dmd2", architecture, 1)
    yield Line("dmd2", architecture, 4 if large else 16)
    yield Line("dmd2", architecture, 1, "lora:64")
    yield Line("dmd2", architecture, 1, "lora:64", optimizer="8bit")
    yield Line("dmd2", architecture, 4 if large else 16, "lora:64")
    yield Line("dmd", architecture, 1 if large else 8, settings=_LPIPS)
    yield Line("dmd", architecture, 1 if large else 8, "lora:64", settings=_LPIPS)
    yield Line("instaflow", architecture, 1 if large else 8)
    yield Line("instaflow", architecture, 1 if large else 8, "lora:64")


def row(line: Line) -> str:
    """Of the table, in Markdown."""
    plan = line.plan()
    card = next((f"{gib} GB" for gib in CARDS if plan.fits(gib)), "none")
    return f"| `{line.command}` | {plan.peak_bytes / GIB:.1f} | {card} |"


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def plans(
    architectures: Annotated[
        list[str] | None, typer.Argument(metavar="ARCH...", help="of fastdistill models  [default: sd15 sd21 sdxl]")
    ] = None,
) -> None:
    """Print a Markdown table: commands, planned peaks in GiB, and the smallest card that is enough."""
    for architecture in architectures or ("sd15", "sd21", "sdxl"):
        print(f"\n| {architecture} | GiB | card |\n|---|---|---|")
        for line in lines(architecture):
            print(row(line), flush=True)


if __name__ == "__main__":
    app(prog_name="python -m fastdistill.bench.plans")
