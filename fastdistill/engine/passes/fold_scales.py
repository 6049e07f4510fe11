"""Scheduler step, Euler's input scaling and the VAE's scaling factor as one affine map of latents and prediction.

A deterministic step is linear in its input and in the prediction, whatever the prediction type; scales after it are
too. `fastdistill.engine.sampling.FoldedSteps` holds the two (LCM: three) numbers per step that remain.
"""

from __future__ import annotations

from fastdistill.engine.components import Components
from fastdistill.engine.report import PassReport


def apply(components: Components) -> PassReport:
    scheduler = components.scheduler
    if scheduler.config.get("clip_sample"):
        reason = f"{type(scheduler).__name__} with clip_sample=True clips the predicted data, which is not linear"
        return PassReport("fold_scales", left=(reason,))
    components.fold_scales = True
    return PassReport("fold_scales", {"scheduler step and scaling of latents, as one affine map per step": 1})
