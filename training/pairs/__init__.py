"""Pairs of noise and the sample that a teacher's ODE makes of it: in memory, or as a set of shards on disk."""

from .generate import Generated, Progress, generate
from .load import Rows, load_pairs
from .memory import Pairs, make_pairs
from .pair_set import PairSet, PairSetError
from .source import Source
from .supply import pairs_for, pairs_of

__all__ = [
    "Generated",
    "PairSet",
    "PairSetError",
    "Pairs",
    "Progress",
    "Rows",
    "Source",
    "generate",
    "load_pairs",
    "make_pairs",
    "pairs_for",
    "pairs_of",
]
