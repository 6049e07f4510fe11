"""Imported once for all processes of `workers`: making a pipeline loads every module that a worker needs."""

import torch

from ..toys import tiny_pipeline
from . import workers

torch.set_num_threads(1)  # threads do not outlive the fork into a worker
tiny_pipeline()

__all__ = ["workers"]
