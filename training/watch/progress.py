"""The run while it runs: bars and figures in a terminal, a line now and then in a file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from .record import memory

if TYPE_CHECKING:
    from ..progress import TrainingProgress

REPORTS_OF_RATE = 20


class Display:
    """Updates done and planned, updates/s, time left, losses, learning rates, skipped updates, validation, memory.

    A callback of `distill` and `Trainer.run`, also on its own; a context that ends the display. Where `console` is no
    terminal, it is a line every `seconds`, and one for the first and the last report of a stage.

    Args:
        console: to write to; None is stderr.
        seconds: between two lines in a file.
        clock: seconds that pass.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console(stderr=True)
        self.seconds, self.clock = seconds, clock
        self._stage: str | None = None
        self._rate = Rate(clock)
        self._said = float("-inf")
        self._bars = Progress(
            SpinnerColumn(finished_text="✓" if self.console.encoding == "utf-8" else "+"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self._live: Live | None = None
        self._task = None

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._task = self._bars.add_task("preparing", total=None, note="")
            self._live = Live(self._bars, console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def begin(self, progress: TrainingProgress) -> None:
        """A stage begins, or is taken up again, at this update."""
        self._stage = progress.stage
        self._rate = Rate(self.clock)
        self._rate.add(progress.update)
        if self._live is not None:
            if self._task is None:
                self._task = self._bars.add_task("", total=None, note="")
            self._bars.update(
                self._task,
                description=progress.stage,
                total=progress.total,
                completed=progress.update,
                note=f"{progress.update}/{progress.total}",
            )
        else:
            self._say(f"{progress.stage}: from update {progress.update} to {progress.total}")

    def __call__(self, progress: TrainingProgress) -> None:
        if progress.stage != self._stage:
            self.begin(progress)
        self._rate.add(progress.update)
        shown = figures(progress, self._rate)
        done = progress.update >= progress.total
        if self._live is None:
            if done or self.clock() - self._said >= self.seconds:
                self._say(f"{progress.stage} " + " | ".join(f"{name} {value}" for name, value in shown.items()))
                self._said = self.clock()
            return
        note = f"{shown.pop('updates')} · {shown.pop('speed')}"
        left = shown.pop("time left")
        self._bars.update(self._task, completed=progress.update, note=note if done else f"{note} · {left} left")
        self._live.update(Group(self._bars, _table(shown)))
        if done:
            self._task, self._stage = None, None

    def say(self, sentence: str) -> None:
        """A sentence that stays, above the bars."""
        self._say(sentence, "yellow")

    def close(self) -> None:
        if self._live is not None:
            if self._stage is None and self._task is not None:
                self._bars.remove_task(self._task)  # nothing came after the preparation
            self._live.stop()
            self._live = None

    def _say(self, text: str, style: str = "") -> None:
        # What is asked of a print is applied to the bars that are drawn again below it too.
        self.console.print(Text(text, style), soft_wrap=self._live is None)


class Rate:
    """Updates per second of the clock over the last reports, validation and pictures included."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque(maxlen=REPORTS_OF_RATE)

    def add(self, update: int) -> None:
        if not self._seen or self._seen[-1][1] != update:
            self._seen.append((self._clock(), update))

    @property
    def per_second(self) -> float | None:
        """None until two reports are there."""
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return None
        (start, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - start)

    def left(self, updates: int) -> float | None:
        """Seconds that so many updates will take."""
        return None if not self.per_second else updates / self.per_second


def figures(progress: TrainingProgress, rate: Rate) -> dict[str, str]:
    """What is shown of a report, by name, as text."""
    left = rate.left(progress.total - progress.update)
    peak, whose = memory(progress)
    skipped = {role: count for role, count in progress.skipped.items() if count}
    shown = {
        "updates": f"{progress.update}/{progress.total}",
        "speed": speed(rate.per_second),
        "time left": "?" if left is None else duration(left),
        "losses": _numbers(progress.losses),
        "learning rates": _numbers(progress.learning_rates),
        "gradient norms": _numbers(progress.gradient_norms),
        "skipped": ", ".join(f"{role} {count}" for role, count in skipped.items()) or "none",
        "validation": _validation(progress),
        "peak memory": "" if peak is None else f"{size(peak)} of the {whose}",
    }
    return {name: value for name, value in shown.items() if value}


def speed(per_second: float | None) -> str:
    """Updates per second, or seconds per update where that is the larger number."""
    if per_second is None:
        return "? updates/s"
    if 0 < per_second < 0.1:
        return f"{1 / per_second:.1f} s per update"
    return f"{per_second:.2f} updates/s"


def duration(seconds: float) -> str:
    """34 s, 5 min 07 s, 3 h 05 min, 2 d 04 h."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    if hours == 0:
        return f"{minutes} min {rest:02d} s"
    days, hours_left = divmod(hours, 24)
    return f"{hours} h {minutes_left:02d} min" if days == 0 else f"{days} d {hours_left:02d} h"


def size(count: int) -> str:
    """Bytes for people: 812 MB, 1.24 GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def number(value: float) -> str:
    """Three significant digits, in as few characters as that takes."""
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def _numbers(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in values.items())


def _validation(progress: TrainingProgress) -> str:
    if not progress.validation:
        return ""
    best = "" if progress.best is None else f", best at {progress.best}"
    return f"{_numbers(progress.validation)} (update {progress.validated}{best})"


def _table(shown: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in shown.items():
        table.add_row(f"  {name}", Text(value, style="red" if name == "skipped" and value != "none" else ""))
    return table
