"""What composes the ways of watching into one callback."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fastdistill._output import check_folder, write_files

from ..world import World
from .jsonl import Log
from .pictures import Samples, save_sheet, sheet
from .plots import DAY, NIGHT, curves, need_matplotlib, plot_png
from .progress import Display
from .record import GROUPS, record
from .report import RunFacts, Shown, render_report
from .tensorboard import NoTensorBoard, TensorBoard

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..progress import TrainingProgress
    from ..recipe import MethodConfig
    from ..teacher import Teacher

PICTURES_OF_A_STAGE = 10
"""How many times a stage is drawn, unless `picture_every` says otherwise."""


def watch(
    folder: str | Path | None = None,
    *,
    teacher: Teacher | DiffusionPipeline | None = None,
    prompts: Sequence[str] = (),
    config: MethodConfig | None = None,
    picture_every: int | None = None,
    seed: int = 0,
    teacher_steps: int = 25,
    teacher_guidance: float = 1.0,
    out: str | Path | None = None,
    command: str = "",
    resume: bool = False,
    world: World | None = None,
    console: Console | None = None,
) -> Watch:
    """A callback for `distill` and `Trainer.run` that shows a run and keeps what is to be seen of it.

        folder/log.jsonl               one JSON object per report
               pictures/STAGE-N.png    the same prompts and noises after N updates of a stage; teacher.png
               plots/STAGE-GROUP.png   losses, learning_rates, gradient_norms, validation
               tensorboard/STAGE/      where tensorboard is installed
               report.html             all of it in one file, written with every picture and at the end

    A picture that fails, or a disk that is full, is said once and does not end the run; the log catches up when it can.
    In every process but the first of `world` it does nothing.

    Args:
        folder: made if it is not there; None shows the progress and keeps nothing.
        teacher: to draw pictures with; None draws none.
        prompts: what the student shall be able to draw; needed for pictures.
        config: of the run, for the report, and to know whether the last student is delivered or the best.
        picture_every: updates of the student between two pictures, at the reports that come next; None for ten of a
            stage.
        seed: of the pictures' noise.
        teacher_steps, teacher_guidance: how the teacher draws the picture to compare with.
        out, command: where the student will be saved, and what was typed, for the report.
        resume: continue what an interrupted run left in `folder`, without a line or a picture twice.
        world: the processes of the run; None asks torchrun's RANK.
        console: to show the progress on; None is stderr.

    Raises:
        ValueError: a bad argument; `folder` holds the log of another run and `resume` is not given.
        OutputError: `folder` cannot be written.
        NoMatplotlib: matplotlib, which draws the plots, is not installed.
    """
    first = world.is_first if world is not None else os.environ.get("RANK", "0") == "0"
    if not first:
        return Watch()
    if picture_every is not None and picture_every < 1:
        raise ValueError(f"picture_every={picture_every}: needed 1 or more updates, or None")
    display = Display(console)
    if folder is None:
        return Watch(display)
    folder = Path(folder)
    check_folder(folder, folder / "log.jsonl", folder / "report.html")
    need_matplotlib()
    if not resume and (folder / "log.jsonl").exists():
        raise ValueError(f"{folder}: holds the log of a run; needed a new folder, or resume to continue that run")
    samples = None
    if teacher is not None:
        pipeline = getattr(teacher, "pipeline", teacher)
        samples = Samples(pipeline, prompts, seed=seed, teacher_steps=teacher_steps, teacher_guidance=teacher_guidance)
    facts = RunFacts(config, getattr(teacher, "name", ""), teacher_steps, str(out or ""), command)
    keeper = Keeper(folder, samples, facts, picture_every, display.say)
    return Watch(keeper, display)  # in this order: what the keeper says at the end is shown


class Watch:
    """Several callbacks as one, and a context that ends them. A part that fails is named and left out; see `watch`."""

    def __init__(self, *parts: Any) -> None:
        self._parts = list(parts)

    def __enter__(self) -> Watch:
        self._all("__enter__")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._all("failed", error)
        self.close()

    def begin(self, progress: TrainingProgress) -> None:
        """Before the first update of a stage, or of what is resumed of it."""
        self._all("begin", progress)

    def __call__(self, progress: TrainingProgress) -> None:
        """After some updates; never ends the run."""
        self._all("__call__", progress)

    def end(self, progress: TrainingProgress) -> None:
        """After the last update of a stage, with the student that it delivers."""
        self._all("end", progress)

    def close(self) -> None:
        """Write what is left to write, and end the display."""
        self._all("close")

    def _all(self, moment: str, *given: Any) -> None:
        for part in list(self._parts):
            method = getattr(part, moment, None)
            try:
                if method is not None:
                    method(*given)
            except Exception as error:  # whatever it is, it is worth less than the run
                self._parts.remove(part)
                warnings.warn(
                    f"{type(part).__name__} is left out from here on: {type(error).__name__}: {error}", stacklevel=3
                )


class Keeper:
    """Keeps a run in a folder: log, TensorBoard, pictures, plots, report.

    Args: as of `watch`; `say` is told, once, of everything that could not be done.
    """

    def __init__(
        self,
        folder: Path,
        samples: Samples | None,
        facts: RunFacts,
        picture_every: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.samples, self.facts, self.picture_every = folder, samples, facts, picture_every
        for pattern in (".log.jsonl-*", ".report.html-*", "pictures/.*.png-*", "plots/.*.png-*"):
            for left in folder.glob(pattern):  # by a process that was killed while it wrote
                left.unlink(missing_ok=True)
        self.log = Log(folder / "log.jsonl")
        self.left_out: list[str] = []
        self._say = say
        self._stage: str | None = None
        self._drawn = 0
        self._plots: dict[tuple[str, str], list[bytes]] = {}
        self._board: TensorBoard | None = None
        try:
            self._board = TensorBoard(folder / "tensorboard")
        except NoTensorBoard as error:
            self._leave_out(str(error))

    def begin(self, progress: TrainingProgress) -> None:
        self._enter(progress.stage, progress.update)
        if not self._picture_path(progress.update).exists():
            self._draw(progress)

    def __call__(self, progress: TrainingProgress) -> None:
        if progress.stage != self._stage:
            self._enter(progress.stage, progress.update - 1)
        line = record(progress)
        self._try("log", lambda: self.log.write(line))
        if self._board is not None:
            self._try("TensorBoard", lambda: self._board.write(line))
        every = self.picture_every or -(-progress.total // PICTURES_OF_A_STAGE)
        # On a grid, so that a run that is interrupted has the pictures of one that is not.
        if progress.update // every > self._drawn // every or progress.update >= progress.total:
            self._draw(progress)
            self._try("plots", lambda: self._plot(DAY))
            self._write_report()

    def end(self, progress: TrainingProgress) -> None:
        """The student that is delivered may be an earlier one, or the run may have been ended between two reports."""
        delivered = progress.best if self._delivers_best() and progress.best is not None else progress.update
        self.facts.delivered[progress.stage] = delivered
        if not self._picture_path(delivered).exists():
            self._draw(progress, delivered)
        self._try("plots", lambda: self._plot(DAY, NIGHT))

    def failed(self, error: BaseException) -> None:
        """What the run ended with."""
        self.facts.ended = f"{type(error).__name__}: {error}".rstrip(": ")

    def close(self) -> None:
        if self._board is not None:
            self._try("TensorBoard", self._board.close)
        if self.log.records:
            self._write_report()

    def _delivers_best(self) -> bool:
        return getattr(getattr(self.facts.config, "trainer", None), "deliver", "last") == "best"

    def _enter(self, stage: str, update: int) -> None:
        self._stage, self._drawn = stage, update
        self._try("log", lambda: self.log.begin(stage, update))
        for number, path in pictures_of(self.folder, stage).items():
            if number > update:
                self._try("pictures", path.unlink)
        if self._board is not None:
            self._try("TensorBoard", lambda: self._board.begin(stage, update))
        if self.samples is not None and not self._picture_path("teacher").exists():
            self._try("pictures", self._draw_teacher)

    def _picture_path(self, update: int | str) -> Path:
        name = update if isinstance(update, str) else f"{self._stage}-{update:08d}"
        return self.folder / "pictures" / f"{name}.png"

    def _draw_teacher(self) -> None:
        facts = {"Software": "fastdistill", "Description": f"teacher, {self.samples.teacher_steps} steps"}
        save_sheet(sheet(self.samples.of_teacher()), self._picture_path("teacher"), facts)

    def _draw(self, progress: TrainingProgress, update: int | None = None) -> None:
        self._drawn = progress.update
        if self.samples is not None and progress.method is not None:
            self._try("pictures", lambda: self._draw_student(progress, progress.update if update is None else update))

    def _draw_student(self, progress: TrainingProgress, update: int) -> None:
        method, self.facts.sampling = progress.method, dict(progress.method.sampling())
        picture = sheet(self.samples.of_student(progress.student, method.scheduler, method.sampling()))
        facts = {"Software": "fastdistill", "Description": f"{progress.stage}, update {update}"}
        save_sheet(picture, self._picture_path(update), facts)
        if self._board is not None:
            self._board.picture(update, picture)

    def _plot(self, *colours: Mapping[str, str]) -> None:
        """On the first of `colours` as files, on all of them in the report."""
        lines = [line for line in self.log.records if line["stage"] == self._stage]
        for group in GROUPS:
            if curves(lines, group):
                drawn = [plot_png(lines, group, each) for each in colours]
                self._plots[self._stage, group] = drawn
                write_files({self.folder / "plots" / f"{self._stage}-{group}.png": drawn[0]})

    def _write_report(self) -> None:
        self._try("report", lambda: write_files({self.folder / "report.html": self._report().encode()}))

    def _report(self) -> str:
        shown = [Shown("teacher", None, self._picture_path("teacher"))]
        for stage in dict.fromkeys(line["stage"] for line in self.log.records):
            shown += [Shown(stage, number, path) for number, path in pictures_of(self.folder, stage).items()]
        prompts = [] if self.samples is None else self.samples.prompts
        there = [each for each in shown if each.path.exists()]
        return render_report(self.log.records, self.facts, there, prompts, self._plots, self.left_out)

    def _try(self, what: str, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:  # whatever it is, it is worth less than the run
            kind = f"{what}: {type(error).__name__}"
            if not any(each.startswith(kind) for each in self.left_out):  # one sentence, whatever its numbers
                self._leave_out(f"{kind}: {error}")

    def _leave_out(self, sentence: str) -> None:
        self.left_out.append(sentence)
        self._say(sentence)


def pictures_of(folder: Path, stage: str) -> dict[int, Path]:
    """The pictures of a stage's student by its updates, in their order."""
    found = {}
    for path in sorted((folder / "pictures").glob("*.png")):
        name, _, number = path.stem.rpartition("-")
        if name == stage and number.isdigit():
            found[int(number)] = path
    return dict(sorted(found.items()))
