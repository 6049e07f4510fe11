"""SIGTERM and SIGINT ask a run to end after the work in hand."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """A context within which the two signals are kept: `requested` names the one that came, or is None.

    Args:
        kept: False leaves the signals alone, for a run that could not be continued anyway. So does another thread than
            the main one, where Python delivers no signals.
        patient: further signals are ignored: launchers and schedulers send more than one, and the work in hand may be a
            checkpoint. Otherwise a second one ends the process as if there were no context.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, kept: bool = True, patient: bool = False) -> None:
        self.kept, self.patient = kept, patient
        self.requested: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interruption:
        if self.kept and _is_main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name
        if not self.patient:
            self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Within, SIGTERM raises KeyboardInterrupt, as SIGINT does: for work that is done again, and leaves nothing."""
    if not _is_main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
