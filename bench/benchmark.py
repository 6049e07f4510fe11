"""What one op's benchmark file supplies: its cases, one setup for speed and accuracy alike, and whom to measure."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

# The ops that have a file here. One op, one name: `fastdistill.bench.<op>` holds its BENCHMARK.
OPS = ("group_norm_silu",)


class UnknownName(ValueError):
    """A case, suite, provider… that does not exist; the message lists those that do."""


@dataclass(frozen=True)
class Case:
    """One input shape and the suites (architectures) it occurs in."""

    shape: tuple[int, ...]  # without the batch dimension
    suites: tuple[str, ...]

    @property
    def name(self) -> str:
        return "x".join(str(size) for size in self.shape)


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call by name, and one gradient per output by the output's name."""

    tensors: dict[str, torch.Tensor]
    grad_outputs: dict[str, torch.Tensor]
    constants: dict[str, object] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype."""
        return Inputs(
            {name: t.to(dtype) for name, t in self.tensors.items()},
            {name: t.to(dtype) for name, t in self.grad_outputs.items()},
            self.constants,
        )

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.tensors.values(), *self.grad_outputs.values()))


@dataclass(frozen=True)
class Provider:
    """Someone who computes the op.

    `prepare(inputs)` returns the function to call with the op's arguments by name; it is asked once per row.
    `missing(inputs)` lists the reasons why it cannot be measured on them; empty means that it can.
    """

    name: str
    prepare: Callable[[Inputs], Callable[..., object]]
    missing: Callable[[Inputs], list[str]] = lambda _: []


@dataclass(frozen=True)
class Benchmark:
    """One op. `setup(case, dtype, layout, device)` makes its random inputs; `baseline` is whom the others are timed
    against, and, in float64, what their errors are taken from; `default` names the providers measured unasked."""

    op: str
    cases: tuple[Case, ...]
    layouts: tuple[str, ...]
    setup: Callable[[Case, torch.dtype, str, torch.device], Inputs]
    baseline: Provider
    providers: tuple[Provider, ...]
    default: tuple[str, ...]
    # A name for several suites at once.
    suite_aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def suites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(suite for case in self.cases for suite in case.suites))

    def select_cases(self, names: Sequence[str] | None) -> tuple[Case, ...]:
        """The cases of the named suites, suite aliases and shapes ("1280x8x8"), in the file's order; None for all."""
        if names is None:
            return self.cases
        wanted: set[Case] = set()
        for name in names:
            suites = self.suite_aliases.get(name, (name,))
            found = [case for case in self.cases if case.name == name or set(suites) & set(case.suites)]
            if not found:
                raise UnknownName(
                    f"unknown shape {name!r} of {self.op}; known suites: "
                    f"{', '.join((*self.suite_aliases, *self.suites))}; known shapes: "
                    f"{', '.join(case.name for case in self.cases)}"
                )
            wanted.update(found)
        return tuple(case for case in self.cases if case in wanted)

    def select_providers(self, names: Sequence[str] | None) -> tuple[Provider, ...]:
        """The named providers ("all" for every one); None for the default ones."""
        known = {provider.name: provider for provider in self.providers}
        if names is None:
            names = self.default
        elif "all" in names:
            names = tuple(known)
        for name in names:
            if name not in known:
                raise UnknownName(f"unknown provider {name!r} of {self.op}; known: {', '.join((*known, 'all'))}")
        return tuple(known[name] for name in dict.fromkeys(names))


def load(op: str) -> Benchmark:
    """The benchmark of an op by name."""
    if op not in OPS:
        raise UnknownName(f"unknown op {op!r}; known: {', '.join(OPS)}")
    return importlib.import_module(f"fastdistill.bench.{op}").BENCHMARK
