"""The inference engine against plain diffusers: a whole call of the bundled digits model, prompt to picture."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastdistill import OneStepPipeline
from fastdistill.engine.compare import interleave
from fastdistill.models import load_pipeline

from . import accuracy, usage
from .gpu import Gpu
from .rows import Key, Row
from .runner import Job
from .timing import PairTimes, Speed
from .usage import Usage

NAME = "engine"
MODEL = "digits-dmd"
BASELINE = "diffusers"
MODES = ("cached prompt", "new prompt")
_PROMPT = "a handwritten seven"
_SEEDS = range(4)


def jobs(device: str, pairs: int, gpu: Gpu | None = None) -> list[Job]:
    """One job of two rows: the prompt known from the call before, or new. float32, batch 1, one step."""
    keys = tuple(Key(NAME, MODEL, mode, "float32", "-", "-", device, "fastdistill") for mode in MODES)
    return [Job(keys, BASELINE, lambda: _rows(keys, device, pairs, gpu))]


def _rows(keys: tuple[Key, ...], device: str, pairs: int, gpu: Gpu | None) -> Iterator[Row]:
    engine = OneStepPipeline.from_pretrained(MODEL, device=device, dtype=torch.float32)
    plain = load_pipeline(MODEL, dtype=torch.float32).to(device)

    def theirs() -> object:
        return _diffusers(plain, 0, "pil")

    def cached() -> object:
        return engine(_PROMPT, seed=0)

    def new() -> object:
        engine.forget_prompts()
        return cached()

    errors = _errors(engine, plain, device)
    for key, ours in zip(keys, (cached, new)):
        timing = interleave(key.mode, theirs, ours, pairs)
        nanoseconds = (tuple(1e9 * seconds for seconds in each) for each in (timing.ours, timing.baseline))
        if ours is new:
            engine.forget_prompts()  # here, because a profiler wonders about memory from before that is freed
        used = usage.on_cpu(cached) if gpu is None else Usage(gpu.peak_bytes(cached))
        yield Row(key, BASELINE, Speed.of(PairTimes(*nanoseconds)), errors, usage=used)


def _errors(engine: OneStepPipeline, plain, device: str) -> accuracy.Accuracy:
    """Of images in [0, 1], against diffusers in float64 from the same noise."""
    exact = load_pipeline(MODEL, dtype=torch.float64).to(device)
    return accuracy.compare(
        {"image": _stack(engine(_PROMPT, seed=seed, output="np") for seed in _SEEDS)},
        {"image": _stack(_diffusers(plain, seed, "np") for seed in _SEEDS)},
        {"image": _stack(_diffusers(exact, seed, "np") for seed in _SEEDS).double()},
        torch.float32,
    )


def _diffusers(pipeline, seed: int, output: str) -> object:
    config = pipeline.unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(pipeline.device, pipeline.unet.dtype)
    return pipeline(_PROMPT, num_inference_steps=1, guidance_scale=1.0, latents=noise, output_type=output).images


def _stack(images: Iterator[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(list(images)))
