"""SIGTERM and SIGINT ask a run to end after the update that it is in; a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interruption:
    """A context within which the two signals are kept: `requested` names the one that came, or is None.

    Args:
        kept: False leaves the signals alone, for a run that could not be continued anyway. So does another thread than
            the main one, where Python delivers no signals.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, kept: bool = True) -> None:
        self.kept = kept
        self.requested: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interruption:
        if self.kept and threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
