"""Walking a network and replacing parts of it, with a count of what was done and why the rest was left."""

from __future__ import annotations

from collections import Counter

import torch

from fastdistill.engine.report import PassReport


def named_parts(network: torch.nn.Module, kind: type) -> list[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """(parent, name, child) for every module of this kind below `network`."""
    return [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]


class Tally:
    """What a pass changed and what it left, on the way to its report."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._changed: Counter[str] = Counter()
        self._left: Counter[str] = Counter()

    def change(self, what: str, count: int = 1) -> None:
        self._changed[what] += count

    def leave(self, what: str, reason: str) -> None:
        self._left[f"{what}: {reason}"] += 1

    def report(self) -> PassReport:
        left = tuple(f"{count} x {what}" for what, count in self._left.items())
        return PassReport(self.name, dict(self._changed), left)
