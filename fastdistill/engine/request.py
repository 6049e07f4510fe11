"""What a call asks for, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastdistill.engine.images import OUTPUTS

_SEED_RANGE = range(-(2**63), 2**64)  # what torch.Generator.manual_seed takes
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Request:
    """One checked call. `guidance` is None where guidance is off; `height` and `width` are of the image, in pixels."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] | None
    seeds: tuple[int, ...]
    steps: int
    guidance: float | None
    output: str
    height: int
    width: int


def check_request(
    prompts: str | Sequence[str],
    *,
    seed: int | Sequence[int],
    steps: int,
    guidance_scale: float,
    output: str,
    size: int | tuple[int, int] | None,
    negative_prompt: str | Sequence[str] | None,
    default_size: tuple[int, int],
    size_multiple: int,
) -> Request:
    """The arguments of `OneStepPipeline.__call__` as a `Request`; raises a ValueError for each that is wrong."""
    checked = _prompts(prompts)
    if not _is_integer(steps) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1; got {steps!r}")
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}; got {output!r}")
    guidance = _guidance(guidance_scale)
    height, width = default_size if size is None else _size(size, size_multiple)
    return Request(
        prompts=checked,
        negative_prompts=_negative_prompts(negative_prompt, len(checked), guidance),
        seeds=_seeds(seed, len(checked)),
        steps=int(steps),
        guidance=guidance,
        output=output,
        height=height,
        width=width,
    )


def check_device(device: torch.device | str | None) -> torch.device:
    """`device`, or the one that is there: a GPU first. Raises a ValueError for one that is unknown or absent."""
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError):
        checked = None
    if checked is None or checked.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:N"; got {device!r}')
    if checked.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = checked.index if checked.index is not None else (torch.cuda.current_device() if count else 0)
    if index >= count:
        raise ValueError(f"device {str(device)!r}: {count} CUDA device{'' if count == 1 else 's'} can be used here")
    return torch.device("cuda", index)


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype` if the engine runs in it, else a ValueError."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}; got {dtype!r}")
    return dtype


def _prompts(prompts) -> tuple[str, ...]:
    listed = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(listed, Sequence):
        raise ValueError(f"prompts must be a string or a list of strings; got {type(prompts).__name__}")
    if not listed:
        raise ValueError("prompts must hold at least one prompt; got an empty list")
    for index, prompt in enumerate(listed):
        if not isinstance(prompt, str):
            raise ValueError(f"prompts[{index}] must be a string; got {prompt!r}")
        if not prompt.strip():
            raise ValueError(f"prompts[{index}] must say something; got {prompt!r}")
    return tuple(listed)


def _negative_prompts(negative, count: int, guidance: float | None) -> tuple[str, ...] | None:
    if guidance is None:
        if negative is not None:
            raise ValueError("negative_prompt needs guidance_scale > 1; guidance is off")
        return None
    if negative is None or isinstance(negative, str):
        return (negative or "",) * count
    if not isinstance(negative, Sequence) or not all(isinstance(prompt, str) for prompt in negative):
        raise ValueError(f"negative_prompt must be a string or a list of strings; got {negative!r}")
    if len(negative) != count:
        raise ValueError(f"negative_prompt must hold one entry per prompt, {count}; got {len(negative)}")
    return tuple(negative)


def _seeds(seed, count: int) -> tuple[int, ...]:
    if _is_integer(seed):
        seeds = tuple(range(int(seed), int(seed) + count))
    elif isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != count:
            raise ValueError(f"seed must be one integer or one per prompt, {count}; got a list of {len(seed)}")
        if not all(_is_integer(each) for each in seed):
            raise ValueError(f"seed must be an integer or a list of integers; got {seed!r}")
        seeds = tuple(map(int, seed))
    else:
        raise ValueError(f"seed must be an integer or a list of integers; got {seed!r}")
    for each in (min(seeds), max(seeds)):
        if each not in _SEED_RANGE:
            raise ValueError(f"seed must be in -2**63..2**64-1; got {each}")
    return seeds


def _guidance(scale) -> float | None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.number)) or not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be a finite number (1 or less is off); got {scale!r}")
    return float(scale) if scale > 1 else None


def _size(size, multiple: int) -> tuple[int, int]:
    pair = (size, size) if _is_integer(size) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(_is_integer(side) for side in pair):
        raise ValueError(f"size must be an integer or (height, width) in pixels; got {size!r}")
    if any(side < multiple or side % multiple for side in pair):
        raise ValueError(f"size must be positive multiples of {multiple} pixels (one latent); got {size!r}")
    return int(pair[0]), int(pair[1])


def _is_integer(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
