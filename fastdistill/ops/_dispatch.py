"""Which backend serves a call, and why the others do not: one record per backend, read by the dispatcher, the error
messages, `explain`, the tests and `fastdistill info`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

REFERENCE = "reference"


class BackendError(RuntimeError):
    """A backend was asked for by name that the op does not have or that cannot serve the call."""


@dataclass(frozen=True)
class Backend:
    """`supports(*args, **kwargs)`, called with the op's own arguments, returns the reasons why this backend cannot
    serve them; an empty list means that it can. `available()` does the same for the machine alone. `device`: the type
    of the tensors that it is tried for unasked (first argument); None for any."""

    name: str
    supports: Callable[..., list[str]]
    available: Callable[[], list[str]] = list
    device: str | None = None


@dataclass(frozen=True)
class Op:
    """An op: its name, the check of its arguments (raises), its backends in order of preference, and what its first
    argument is called, the tensor (or list of them) whose device decides.

    `preferred(*args, **kwargs)`: names of backends to be tried before that order, where the best one depends on the
    call. `notes(*args, **kwargs)`: what `explain` adds, by the name of a backend, or "choice" for why one is preferred.
    """

    name: str
    check: Callable[..., None]
    backends: tuple[Backend, ...]
    tensor: str = "x"
    preferred: Callable[..., Sequence[str]] | None = None
    notes: Callable[..., dict[str, str]] | None = None

    def backend(self, name: str) -> Backend:
        for candidate in self.backends:
            if candidate.name == name:
                return candidate
        known = ", ".join(b.name for b in self.backends)
        raise BackendError(f"{self.name} has no backend {name!r}; it has: {known}")


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call (`backend`), and per backend the reasons why it cannot (empty: it could). `notes`:
    what else is known of a backend, and under "choice" why one is preferred."""

    op: str
    backend: str
    reasons: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: served by {self.backend}{self._note(self.backend)}"]
        if "choice" in self.notes:
            lines.append(f"  choice: {self.notes['choice']}")
        for name, reasons in self.reasons.items():
            if name == self.backend:
                continue
            state = "; ".join(reasons) if reasons else "could serve, not preferred"
            lines.append(f"  {name}: {state}{self._note(name)}")
        return "\n".join(lines)

    def _note(self, name: str) -> str:
        return f" ({self.notes[name]})" if name in self.notes else ""


def constant(function):
    """Marks a question about the machine: torch.compile asks it once while tracing, instead of tracing into it.

    What `torch.compiler.assume_constant_result` does, without its import of the compiler (a second at start-up).
    """
    function._dynamo_marked_constant = True
    return function


_OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    _OPS[op.name] = op
    return op


def ops() -> dict[str, Op]:
    """Every registered op by name."""
    return dict(_OPS)


def requested(op: Op, backend: str | None) -> str | None:
    """The backend asked for: the argument, else FASTDISTILL_BACKEND ("triton" or "group_norm_silu=triton,…")."""
    if backend is not None:
        return backend
    setting = os.environ.get("FASTDISTILL_BACKEND")
    if not setting:
        return None
    general = None
    for entry in setting.split(","):
        name, separator, value = entry.strip().partition("=")
        if not separator:
            general = name
        elif name == op.name:
            return value
        elif name not in _OPS:
            raise BackendError(
                f"FASTDISTILL_BACKEND={setting!r} names an unknown op {name!r}; known: {', '.join(_OPS)}"
            )
    return general


def select(op: Op, backend: str | None, *args, **kwargs) -> str:
    """The name of the backend that serves this call. A forced one that cannot raises with its reasons."""
    name = requested(op, backend)
    if name is not None:
        reasons = op.backend(name).supports(*args, **kwargs)
        if reasons:
            raise BackendError(f"{op.name}: backend {name!r} cannot serve this call: {'; '.join(reasons)}")
        return name
    device = device_of(args[0] if args else kwargs[op.tensor]).type
    candidates = op.backends
    if op.preferred is not None:
        candidates = (*(op.backend(name) for name in op.preferred(*args, **kwargs)), *candidates)
    for candidate in candidates:
        # Asking only the device's own backends halves what a call costs in Python.
        if candidate.device in (None, device) and not candidate.supports(*args, **kwargs):
            return candidate.name
    raise BackendError(str(_explanation(op, "none", args, kwargs)))


def device_of(argument) -> torch.device:
    """Of a tensor (or whatever else has one), or of the first of a list."""
    return (argument if hasattr(argument, "device") else argument[0]).device


def _explanation(op: Op, chosen: str, args: tuple, kwargs: dict) -> Explanation:
    reasons = {b.name: b.supports(*args, **kwargs) for b in op.backends}
    return Explanation(op.name, chosen, reasons, op.notes(*args, **kwargs) if op.notes else {})


def explain(op: str, *args, backend: str | None = None, **kwargs) -> Explanation:
    """Which backend would serve `fastdistill.ops.<op>(*args, **kwargs)`, and why each other one would not.

    Raises what the call itself would raise: bad input, or a forced backend that cannot serve.
    """
    if op not in _OPS:
        raise ValueError(f"op={op!r}: unknown; known ops: {', '.join(sorted(_OPS))}")
    record = _OPS[op]
    record.check(*args, **kwargs)
    return _explanation(record, select(record, backend, *args, **kwargs), args, kwargs)
