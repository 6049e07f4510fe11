"""Imported once for all processes of `processes`: making a pipeline loads every module that one needs."""

import fastdistill.training.__main__
import matplotlib.backends.backend_agg
import matplotlib.figure
import torch

from . import sharded_runs
from .pairs import workers
from .toys import tiny_pipeline

torch.set_num_threads(1)  # threads do not outlive the fork
tiny_pipeline()

__all__ = ["fastdistill", "matplotlib", "sharded_runs", "workers"]
