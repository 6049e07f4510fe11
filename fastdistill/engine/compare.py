"""The engine against plain diffusers, side by side on this machine: `python -m fastdistill.engine.compare`.

Both run the same folder, prompts, seeds and steps in one process, in turn, so that whatever else the machine does hits
both. The prompt is encoded in every diffusers call; the engine is timed with that too ("new prompt") and without.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fastdistill.engine.pipeline import OneStepPipeline
from fastdistill.models import ModelError, load_pipeline

_WARM_UP_CALLS = 5


@dataclass(frozen=True)
class Timing:
    """Seconds of interleaved pairs: `baseline[i]` and `ours[i]` were measured one right after the other."""

    name: str
    baseline: tuple[float, ...]
    ours: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """How many times faster than the baseline, pair by pair."""
        return [theirs / mine for theirs, mine in zip(self.baseline, self.ours)]


def compare(model: str, *, steps: int = 1, pairs: int = 60, prompt: str = "a handwritten seven", **options) -> str:
    """The comparison as a table.

    Args:
        model: as for `OneStepPipeline.from_pretrained`.
        steps: denoising steps, without guidance.
        pairs: timed pairs per row.
        prompt: what is drawn.
        options: `device`, `dtype` and `passes` of the engine; device and dtype are given to diffusers too.

    Raises:
        ValueError: pairs < 3, or what the engine itself raises.
    """
    if pairs < 3:
        raise ValueError(f"pairs must be at least 3; got {pairs}")
    engine = OneStepPipeline.from_pretrained(model, **options)
    plain = load_pipeline(model, dtype=engine.dtype).to(engine.device)

    def theirs(seed: int = 0, output: str = "pil"):
        generator = torch.Generator().manual_seed(seed)
        return plain(
            prompt, num_inference_steps=steps, guidance_scale=1.0, generator=generator, output_type=output
        ).images

    def cached(seed: int = 0, output: str = "pil"):
        return engine(prompt, seed=seed, steps=steps, output=output)

    def new() -> None:
        engine.forget_prompts()
        cached()

    timings = [interleave("new prompt", theirs, new, pairs), interleave("cached prompt", theirs, cached, pairs)]
    differences = [np.abs(theirs(seed, "np") - cached(seed, "np")).max() for seed in range(8)]
    bytes_off = [_bytes_that_differ(theirs(seed)[0], cached(seed)[0]) for seed in range(8)]
    dtype = str(engine.dtype).removeprefix("torch.")
    header = (
        f"{model}: {engine.device}, {torch.get_num_threads()} CPU thread(s), {dtype}, batch 1, {steps} step(s), "
        f"torch {torch.__version__}; {pairs} interleaved pairs per row"
    )
    accuracy = (
        f"largest difference of images in [0, 1] over 8 seeds: {max(differences):.2g}; "
        f"bytes of the pictures that differ: {sum(off for off, _ in bytes_off)} of {sum(size for _, size in bytes_off)}"
    )
    return "\n".join([header, table(timings), accuracy])


def interleave(name: str, baseline: Callable[[], object], ours: Callable[[], object], pairs: int) -> Timing:
    """Time the two in turn, the order changing from pair to pair."""
    for _ in range(_WARM_UP_CALLS):
        ours()  # first, since it checks its arguments
        baseline()
    first, second = [], []
    for pair in range(pairs):
        for function, seconds in ((baseline, first), (ours, second))[:: -1 if pair % 2 else 1]:
            start = time.perf_counter()
            function()  # returns a picture on the host, so nothing is pending on a device
            seconds.append(time.perf_counter() - start)
    return Timing(name, tuple(first), tuple(second))


def table(timings: list[Timing]) -> str:
    """Medians with 20 % and 80 % quantiles; the ratio is that of pairs, not of medians."""
    lines = [f"{'':<15}{'diffusers, ms':>24}{'fastdistill, ms':>24}{'times faster':>24}"]
    for timing in timings:
        columns = [[1e3 * seconds for seconds in timing.baseline], [1e3 * seconds for seconds in timing.ours]]
        cells = [_quantiles(values) for values in (*columns, timing.ratios)]
        lines.append(f"{timing.name:<15}" + "".join(f" {cell:>23}" for cell in cells))
    return "\n".join(lines)


def _quantiles(values: list[float]) -> str:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return f"{statistics.median(values):.2f} ({fifths[0]:.2f}-{fifths[3]:.2f})"


def _bytes_that_differ(one, other) -> tuple[int, int]:
    one, other = np.asarray(one), np.asarray(other)
    return int((one != other).sum()), one.size


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastdistill.engine.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="digits-dmd", help="bundled name or diffusers folder")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=60, help="timed pairs per row")
    parser.add_argument("--prompt", default="a handwritten seven")
    parser.add_argument("--device", default=None, help='"cpu", "cuda"; default: a GPU when there is one')
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of torch; default: torch's own choice")
    parser.add_argument("--without", action="append", default=[], metavar="PASS", help="switch a pass off; repeatable")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        text = compare(
            options.model,
            steps=options.steps,
            pairs=options.pairs,
            prompt=options.prompt,
            device=options.device,
            passes=dict.fromkeys(options.without, False),
        )
    except (ModelError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    print(text)


if __name__ == "__main__":
    main()
