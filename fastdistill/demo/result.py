"""What a demo found out, apart from how it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from fastdistill.models.digits.metrics import DigitScores

# Ratio of the 80 % to the 20 % quantile. Seen on one thread beside three other jobs: 1.1 to 1.5; on two threads of an
# overloaded machine: 25 to 75, and a speedup that was wrong.
DISTURBED = 2.0


@dataclass(frozen=True)
class Row:
    """One way of making the digits.

    Attributes:
        name, note: for people: "Teacher", and what is special about it.
        steps: denoising steps per image.
        samples: `(100, 32, 32)` uint8, 255 is ink. Sample i is the digit i % 10, from the same noise in every row.
        milliseconds: per image, made one at a time: the 20 %, 50 % and 80 % quantiles.
        scores: of all images that were made, see `fastdistill.models.digits.metrics`.
    """

    name: str
    note: str
    steps: int
    samples: np.ndarray
    milliseconds: tuple[float, float, float]
    scores: DigitScores

    @property
    def median(self) -> float:
        return self.milliseconds[1]

    @property
    def title(self) -> str:
        return f"{self.name}, {self.steps} step{'s' if self.steps > 1 else ''}"


@dataclass(frozen=True)
class Training:
    """A distillation that ran while the demo was made: what it did, and for how long."""

    method: str
    updates: int
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """Everything that the page and the picture show.

    Attributes:
        rows: slow teacher first, the student to be proud of last.
        images: how many images each row's scores are of.
        timed: how many images each row's time is the median of.
        seed: image i starts from the noise of `seed + i`.
        machine: see `fastdistill.info.machine`; with "device", where the networks ran.
        versions: package to version.
        command: what to type to make this again.
        date: UTC, ISO 8601.
        seconds: that the whole demo took.
        training: None if nothing was trained.
    """

    rows: tuple[Row, ...]
    images: int
    timed: int
    seed: int
    machine: dict
    versions: dict[str, str]
    command: str
    date: str
    seconds: float
    training: Training | None = None

    @property
    def teacher(self) -> Row:
        """The row that takes many steps."""
        return self.rows[0]

    @property
    def untrained(self) -> Row:
        """The teacher hurried: its own network in one step, which is what every student starts as."""
        return self.rows[1]

    @property
    def student(self) -> Row:
        return self.rows[-1]

    @property
    def disturbed(self) -> bool:
        """Whether times scattered so much that something else must have been running: they then say little."""
        return any(high > DISTURBED * low for low, _, high in (row.milliseconds for row in self.rows))

    @property
    def speedup(self) -> float:
        """How many times faster the student makes an image than the teacher in all its steps."""
        return self.teacher.median / self.student.median
