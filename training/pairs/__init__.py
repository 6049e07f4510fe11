"""Pairs of noise and the sample that a teacher's ODE makes of it: in memory, or as a set of shards on disk."""

from .memory import Pairs, make_pairs

__all__ = ["Pairs", "make_pairs"]
