"""Figures of a finished student over many images, by any number of processes."""

from .figures import evaluate, evaluate_on_ray

__all__ = ["evaluate", "evaluate_on_ray"]
