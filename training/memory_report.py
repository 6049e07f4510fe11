"""A plan of memory as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .memory_plan import CARDS, GIB, MemoryPlan, RoleMemory, StageMemory, TurnMemory

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_ROLE = ("weights", "gradients", "optimiser", "average")
_TURN = ("stays", "gradients", "activations", "peak")


def render(plan: MemoryPlan) -> Group:
    """Everything: roles and turns of every stage, what was chosen and why, and which cards are enough."""
    from rich.console import Group
    from rich.text import Text

    height, width = plan.resolution
    accumulated = f" x {plan.accumulation}" if plan.accumulation > 1 else ""
    lines: list[Any] = [
        Text(f"{plan.method} on {plan.architecture}, {width} x {height} pixels, batch {plan.batch_size}{accumulated}\n")
    ]
    for stage in plan.stages:
        lines += [_roles(stage), Text(), _turns(stage)]
        lines += [_largest(turn) for turn in stage.turns if turn.largest]
        lines.append(Text(_chosen(stage)))
    return Group(*lines, Text(peak(plan)))


def short(plan: MemoryPlan) -> Group:
    """The roles and turns of the stage that needs most, and the peak."""
    from rich.console import Group
    from rich.text import Text

    return Group(_roles(plan.stage), Text(), _turns(plan.stage), Text("\n" + peak(plan)))


def peak(plan: MemoryPlan) -> str:
    """One line: the peak, and which cards are enough."""
    if plan.device == "cpu":
        return f"Planned peak of tensors: {size(plan.tensor_bytes)}."
    fits = [card for card, enough in plan.cards.items() if enough]
    enough = f"fits on cards of {', '.join(fits)}" if fits else f"too much for a card of {max(CARDS)} GB"
    return (
        f"Planned peak: {size(plan.peak_bytes)}, of tensors {size(plan.tensor_bytes)}, the rest context and "
        f"workspaces; {enough}."
    )


def measured(plan: MemoryPlan, peak_bytes: int | None) -> str:
    """One line for after the run: the peak of its tensors beside the planned one.

    peak_bytes: `torch.cuda.max_memory_allocated`; None where nothing measures it.
    """
    planned = f"planned peak of tensors {size(plan.tensor_bytes)}"
    if peak_bytes is None:
        return f"Memory: {planned}; nothing measures it in a run on a CPU"
    return f"Memory: {planned}, measured {size(peak_bytes)} ({peak_bytes / plan.tensor_bytes:.2f} of it)"


def size(count: int) -> str:
    """Bytes in the unit that suits them; "-" for none."""
    if count == 0:
        return "-"
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def _roles(stage: StageMemory) -> Table:
    table = _table(stage.stage, ("values", *_ROLE))
    for role in stage.roles:
        table.add_row(role.role, _values(role), *(size(getattr(role, f"{_FIELDS[each]}_bytes")) for each in _ROLE))
    if stage.data_bytes:
        table.add_row("data, prompts", "", size(stage.data_bytes))
    return table


def _turns(stage: StageMemory) -> Table:
    table = _table("turn", _TURN)
    for turn in stage.turns:
        stays = turn.peak_bytes - turn.gradient_bytes - turn.activation_bytes
        row = (stays, turn.gradient_bytes, turn.activation_bytes, turn.peak_bytes)
        table.add_row(turn.turn, *map(size, row))
    return table


def _largest(turn: TurnMemory) -> Table:
    table = _table(f"largest at the peak of {turn.turn}", ("size", "shape", "dtype", "made by"))
    for each in turn.largest:
        table.add_row("", size(each.bytes), " x ".join(map(str, each.shape)), each.dtype, each.made_by)
    return table


def _chosen(stage: StageMemory) -> str:
    lines = [f"  {name} {value}: {why}" for name, (value, why) in stage.chosen.items()]
    return "\n".join(["\nChosen where nothing was said:", *lines, ""]) if lines else ""


def _table(first: str, headings: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


_FIELDS = {"weights": "weight", "gradients": "gradient", "optimiser": "optimizer", "average": "average"}


def _values(role: RoleMemory) -> str:
    return f"{role.parameters / 1e6:.4g} M" if role.parameters else "-"
