"""A device of which everything is known: steps cost what they say, replays repeat what was recorded."""

from __future__ import annotations

import contextlib

import torch
from fastdistill.bench.gpu import Recording


class FakeGpu:
    """`now` is the device's clock in microseconds, `run(name, cost)` makes a step, `log` holds steps as they ran."""

    def __init__(self, l2_bytes=1000, free_bytes=1_000_000, recordable=True):
        self.device = torch.device("cpu")
        self.l2_bytes, self.free, self.recordable = l2_bytes, free_bytes, recordable
        self.now, self.log, self.recorded, self.marks = 0.0, [], [], 0
        self.inside = self.waited = False
        self._recording = None

    def free_bytes(self):
        return self.free

    @contextlib.contextmanager
    def stream(self):
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def run(self, name, cost, result=None):
        def step():
            assert self.inside, "a step ran outside the timing stream"
            if self._recording is None:
                self._execute(name, cost)
            else:
                self._recording.append((name, cost))
            return result() if result else None

        return step

    def _execute(self, name, cost):
        self.log.append(name)
        self.now += cost() if callable(cost) else cost

    def record(self, work):
        if not self.recordable:
            raise RuntimeError("operation not permitted when\nstream is capturing")
        self._recording = steps = []
        work()
        self._recording = None
        self.recorded.append([name for name, _ in steps])
        return Recording(lambda: [self._execute(*step) for step in steps], 2 * len(steps))

    def mark(self):
        assert not self.waited, "the host waited between two timed pieces of work"
        self.marks += 1
        return self.now

    def elapsed_us(self, start, end):
        return end - start

    def synchronize(self):
        self.waited = True

    def peak_bytes(self, work):
        work()
        return 4096

    def release(self):
        self.waited = False
