"""One-step inference: a diffusers pipeline rewritten by exact passes and run without detours."""

from fastdistill.engine.passes import PASSES
from fastdistill.engine.pipeline import OneStepPipeline
from fastdistill.engine.report import EngineReport, PassReport

__all__ = ["PASSES", "EngineReport", "OneStepPipeline", "PassReport"]
