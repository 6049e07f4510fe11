"""What `FusedAdamW` keeps per parameter, and its conversion from and to the state of `torch.optim.AdamW`.

Keys of a parameter's state: `step` () float32 and, in its order of memory, `exp_avg` and `exp_avg_sq` (AdamW's);
`master` where the parameter has 16 bits; with moments of 8 bits `exp_avg_codes`, `exp_avg_sq_codes` (uint8) and
`moment_scales` (2, blocks) in place of the two. Of a sharded parameter all but `step` are this process's part: sharded
as the parameter is, but the 8-bit ones, whose blocks are of this part alone, plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastdistill.ops import eight_bit
from fastdistill.ops.gradient_norm import is_dense, walk_alike
from fastdistill.optim.shards import as_sharded, is_sharded, local

SMALLEST_IN_EIGHT_BITS = 4096  # elements; smaller tensors keep float32: they are many, and together little
_CODES = ("exp_avg_codes", "exp_avg_sq_codes")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def wide_dtype(param: torch.Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def has_master(param: torch.Tensor) -> bool:
    return param.dtype in (torch.float16, torch.bfloat16)


def in_eight_bits(param: torch.Tensor, state_bits: int) -> bool:
    part = local(param)
    large = part.numel() >= SMALLEST_IN_EIGHT_BITS
    return state_bits == 8 and large and param.dtype != torch.float64 and is_dense(part)


def new_state(param: torch.Tensor, state_bits: int) -> dict[str, torch.Tensor]:
    """Of a parameter that has not been stepped."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}
    if in_eight_bits(param, state_bits):
        codes = eight_bit.zeros(local(param))
        state |= dict(zip((*_CODES, "moment_scales"), codes))
    else:
        state |= {key: torch.zeros_like(param, dtype=wide_dtype(param)) for key in _MOMENTS}
    if has_master(param):
        state["master"] = param.detach().float()
    return state


def adopt(param: torch.Tensor, saved: Mapping[str, Any], state_bits: int) -> dict[str, torch.Tensor]:
    """A new state from `saved`: AdamW's or one of ours, of any width, dtype, device and order of memory.

    Raises:
        ValueError: `saved` lacks something, or a shape does not fit.
    """
    if not saved:
        return {}
    moments = saved if _MOMENTS[0] in saved else moments_of(saved)
    missing = [key for key in ("step", *_MOMENTS) if key not in moments]
    if missing:
        raise ValueError(f"state_dict: a parameter's state has no {missing[0]!r}; it has {sorted(saved)}")
    for key in _MOMENTS:
        if moments[key].shape != param.shape:
            raise ValueError(f"state_dict: {key} has shape {tuple(moments[key].shape)}, needs {tuple(param.shape)}")
    step = torch.as_tensor(moments["step"]).to(device=param.device, dtype=torch.float32, copy=True).reshape(())
    state = {"step": step}
    exp_avg, exp_avg_sq = (_like(param, moments[key]) for key in _MOMENTS)
    if not in_eight_bits(param, state_bits):
        state |= {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    elif _CODES[0] in saved and not is_sharded(param) and all(walk_alike(saved[key], param) for key in _CODES):
        state |= {key: saved[key].to(param.device, copy=True) for key in (*_CODES, "moment_scales")}
    else:
        first, second = (eight_bit.encode(local(t), step, second=t is exp_avg_sq) for t in (exp_avg, exp_avg_sq))
        scales = torch.stack([first[1], second[1]])
        state |= dict(zip((*_CODES, "moment_scales"), (first[0], second[0], scales)))
    if has_master(param):
        state["master"] = _like(param, saved["master"]) if "master" in saved else param.detach().float()
    return state


def moments_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """`step`, `exp_avg` and `exp_avg_sq` of one of our states, float32 where it has 8 bits."""
    moments = {key: state[key] for key in ("step", *_MOMENTS) if key in state}
    if _CODES[0] in state:
        scales = state["moment_scales"]
        for row, (key, codes) in enumerate(zip(_MOMENTS, _CODES)):
            moments[key] = eight_bit.decode(state[codes], scales[row], second=row == 1)
    return moments


def of_all_processes(param: torch.Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state whose tensors are sharded as `param` is, so that any number of processes can load it."""
    if not is_sharded(param) or _CODES[0] not in state:
        return dict(state)
    kept = {key: value for key, value in state.items() if key not in (*_CODES, "moment_scales")}
    return kept | {key: _of_part(param, value) for key, value in moments_of(state).items() if key in _MOMENTS}


def _of_part(param: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A sharded tensor of which `part` is this process's."""
    whole = torch.empty_like(param, dtype=part.dtype, requires_grad=False)
    local(whole).copy_(part)
    return whole


def _like(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(param, dtype=wide_dtype(param), requires_grad=False)
    local(result).copy_(local(as_sharded(value, param)))
    return result
