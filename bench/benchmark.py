"""What one op's benchmark file supplies: its cases, one setup for speed and accuracy alike, and whom to measure."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .devices import DeviceSpec
from .roofline import Cost
from .tiling import Tiling

# The ops that have a file here. One op, one name: `fastdistill.bench.<op>` holds its BENCHMARK.
OPS = (
    "group_norm_silu",
    "layer_norm",
    "geglu",
    "attention",
    "dmd_gradient",
    "weighted_squared_error",
    "lpips_distance",
    "adversarial_loss",
    "squared_norm",
)


class UnknownName(ValueError):
    """A case, suite, provider… that does not exist; the message lists those that do."""


@dataclass(frozen=True)
class Case:
    """One input shape, the suites (architectures) it occurs in, and the variant of the op, where it has several."""

    shape: tuple[int, ...]  # without the batch dimension
    suites: tuple[str, ...]
    variant: str = ""

    @property
    def name(self) -> str:
        return "x".join(str(size) for size in self.shape) + (f"+{self.variant}" if self.variant else "")


def cases(shapes: Mapping[str, Sequence[tuple[int, ...]]], variants: Sequence[str] = ("",)) -> tuple[Case, ...]:
    """From the shapes of each suite: a shape of several suites is one case (per variant)."""
    suites: dict[tuple[int, ...], tuple[str, ...]] = {}
    for suite, members in shapes.items():
        for shape in members:
            suites[shape] = (*suites.get(shape, ()), suite)
    return tuple(Case(shape, names, variant) for shape, names in suites.items() for variant in variants)


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call by name, and one gradient per output by the output's name. Of `tensors` gradients are
    taken; what needs none, numbers and further tensors alike, is in `constants`."""

    tensors: dict[str, torch.Tensor]
    grad_outputs: dict[str, torch.Tensor]
    constants: dict[str, object] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype."""
        return Inputs(
            {name: t.to(dtype) for name, t in self.tensors.items()},
            {name: t.to(dtype) for name, t in self.grad_outputs.items()},
            {name: v.to(dtype) if isinstance(v, torch.Tensor) else v for name, v in self.constants.items()},
        )

    def nbytes(self, mode: str) -> int:
        """Read by one call: a forward pass has no use for gradients."""
        gradients = () if mode == "forward" else self.grad_outputs.values()
        constants = [v for v in self.constants.values() if isinstance(v, torch.Tensor)]
        return sum(t.nbytes for t in (*self.tensors.values(), *constants, *gradients))


@dataclass(frozen=True)
class Provider:
    """Someone who computes the op.

    `prepare(inputs)` returns the function to call with the op's arguments by name; it is asked once per row.
    `missing(inputs)` lists the reasons why it cannot be measured on them; empty means that it can. `adapt(inputs)`
    brings them into the form that it takes, before the clock runs. A `peer` is someone else's work: its error is shown,
    but is not a failure of this package. `compiled`: what it dispatches is not what it runs. `note` goes into its rows,
    and so does what `remark(inputs)` says of the inputs of a row.
    """

    name: str
    prepare: Callable[[Inputs], Callable[..., object]]
    missing: Callable[[Inputs], list[str]] = lambda _: []
    adapt: Callable[[Inputs], Inputs] = lambda inputs: inputs
    peer: bool = False
    compiled: bool = False
    note: str = ""
    remark: Callable[[Inputs], str] = lambda _: ""


@dataclass(frozen=True)
class Benchmark:
    """One op. `setup(case, dtype, layout, device)` makes its random inputs; `cost(case, dtype, mode)` is what any
    implementation must do; `baseline` is whom the others are timed against, and, in float64, what their errors are
    taken from; `default` names the providers measured unasked."""

    op: str
    cases: tuple[Case, ...]
    layouts: tuple[str, ...]
    setup: Callable[[Case, torch.dtype, str, torch.device], Inputs]
    cost: Callable[[Case, torch.dtype, str], Cost]
    baseline: Provider
    providers: tuple[Provider, ...]
    default: tuple[str, ...]
    # A name for several suites at once.
    suite_aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # The case that stands for one whose error alone is computed on a CPU, where that would take too long; the flag:
    # whether kernels run in Triton's interpreter.
    smaller: Callable[[Case, bool], Case] = lambda case, interpreted: case
    # How implementations divide a case, in a dtype and a mode, among the multiprocessors of a device: where an op's
    # file counts it, predictions show it.
    tilings: Callable[[Case, torch.dtype, str, DeviceSpec], Sequence[Tiling]] | None = None

    @property
    def suites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(suite for case in self.cases for suite in case.suites))

    def known_suites(self) -> tuple[str, ...]:
        return (*self.suite_aliases, *self.suites)

    def find_cases(self, name: str) -> set[Case]:
        """Those of a suite, of a suite's alias, or of a shape ("1280x8x8")."""
        suites = set(self.suite_aliases.get(name, (name,)))
        return {case for case in self.cases if case.name == name or suites & set(case.suites)}

    def select_cases(self, names: Sequence[str] | None) -> tuple[Case, ...]:
        """As the function of that name, of this op alone."""
        return select_cases([self], names)[0]

    def select_providers(self, names: Sequence[str] | None) -> tuple[Provider, ...]:
        """As the function of that name, of this op alone."""
        return select_providers([self], names)[0]


def select_cases(chosen: Sequence[Benchmark], names: Sequence[str] | None) -> list[tuple[Case, ...]]:
    """Per op the cases of the named suites and shapes, in the file's order; None for all. An op may have none."""
    if names is None:
        return [each.cases for each in chosen]
    for name in names:
        if not any(each.find_cases(name) for each in chosen):
            suites = dict.fromkeys(suite for each in chosen for suite in each.known_suites())
            shapes = dict.fromkeys(case.name for each in chosen for case in each.cases)
            raise UnknownName(
                f"unknown shape {name!r} of {_ops(chosen)}; known suites: {', '.join(suites)}; "
                f"known shapes: {', '.join(shapes)}"
            )
    wanted = [set().union(*(each.find_cases(name) for name in names)) for each in chosen]
    return [tuple(case for case in each.cases if case in cases) for each, cases in zip(chosen, wanted)]


def select_providers(chosen: Sequence[Benchmark], names: Sequence[str] | None) -> list[tuple[Provider, ...]]:
    """Per op the named providers ("all" for every one); None for its default ones. An op may have none of them."""
    known = [{provider.name: provider for provider in each.providers} for each in chosen]
    everyone = tuple(dict.fromkeys(name for providers in known for name in providers))
    for name in names or ():
        if name not in (*everyone, "all"):
            raise UnknownName(f"unknown provider {name!r} of {_ops(chosen)}; known: {', '.join((*everyone, 'all'))}")
    wanted = [each.default if names is None else everyone if "all" in names else names for each in chosen]
    return [tuple(of[name] for name in dict.fromkeys(these) if name in of) for of, these in zip(known, wanted)]


def select_layouts(chosen: Sequence[Benchmark], names: Sequence[str] | None) -> list[tuple[str, ...]]:
    """Per op the named layouts ("all" for every one, as None). An op may have none of them."""
    known = dict.fromkeys(layout for each in chosen for layout in each.layouts)
    for name in names or ():
        if name not in (*known, "all"):
            raise UnknownName(f"--layout: unknown {name!r}; known: {', '.join((*known, 'all'))}")
    if names is None or "all" in names:
        return [each.layouts for each in chosen]
    return [tuple(layout for layout in names if layout in each.layouts) for each in chosen]


def _ops(chosen: Sequence[Benchmark]) -> str:
    return ", ".join(each.op for each in chosen) or "no op"


def load(op: str) -> Benchmark:
    """The benchmark of an op by name."""
    if op not in OPS:
        raise UnknownName(f"unknown op {op!r}; known: {', '.join(OPS)}")
    return importlib.import_module(f"fastdistill.bench.{op}").BENCHMARK
