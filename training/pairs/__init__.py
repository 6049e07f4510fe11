"""Pairs of noise and the sample that a teacher's ODE makes of it: in memory, or as a set of shards on disk."""

from .generation import Generated, Progress, generate
from .inspection import Contents, inspect
from .load import Rows, load_pairs
from .memory import Pairs, make_pairs
from .pair_set import PairSet, PairSetError
from .source import Source
from .supply import pairs_for, pairs_of
from .verification import Problem, verify

__all__ = [
    "Contents",
    "Generated",
    "PairSet",
    "PairSetError",
    "Pairs",
    "Problem",
    "Progress",
    "Rows",
    "Source",
    "generate",
    "inspect",
    "load_pairs",
    "make_pairs",
    "pairs_for",
    "pairs_of",
    "verify",
]
