"""The engine's passes: exact rewrites of a model, one per file, each with a name and a switch.

A pass is a function `apply(components) -> PassReport` that rewrites `Components` in place. Exact means: the same
function of its input in real arithmetic; in floating point results differ by rounding, at most 1e-10 in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from fastdistill.engine.components import Components
from fastdistill.engine.passes import (
    channels_last,
    cross_attention_cache,
    direct_attention,
    fold_scales,
    fold_timestep,
    fused_group_norm_silu,
    prompt_cache,
)
from fastdistill.engine.report import PassReport

# In the order of application: attention takes over the norms it finds, channels_last the convolutions that are left,
# and cross_attention_cache the cross-attentions that direct_attention has written, for as long as prompts are kept.
PASSES: dict[str, Callable[[Components], PassReport]] = {
    "fused_group_norm_silu": fused_group_norm_silu.apply,
    "fold_timestep": fold_timestep.apply,
    "direct_attention": direct_attention.apply,
    "channels_last": channels_last.apply,
    "fold_scales": fold_scales.apply,
    "prompt_cache": prompt_cache.apply,
    "cross_attention_cache": cross_attention_cache.apply,
}


def check_switches(passes: Iterable[str] | Mapping[str, bool] | None) -> dict[str, bool]:
    """Every pass and whether it is on.

    Args:
        passes: None for all; names for only these; a mapping for all but those it switches off.

    Raises:
        ValueError: an unknown name (the known ones are listed), or a switch that is not a bool.
    """
    if passes is None:
        return dict.fromkeys(PASSES, True)
    if isinstance(passes, str) or not isinstance(passes, Iterable):
        raise ValueError(f"passes must be None, names or a mapping from name to bool; got {passes!r}")
    named = list(passes)
    for name in named:
        if name not in PASSES:
            raise ValueError(f"passes: unknown pass {name!r}; known: {', '.join(PASSES)}")
    if not isinstance(passes, Mapping):
        return {name: name in named for name in PASSES}
    for name, switch in passes.items():
        if not isinstance(switch, bool):
            raise ValueError(f"passes[{name!r}] must be True or False; got {switch!r}")
    return {name: passes.get(name, True) for name in PASSES}


def apply_passes(components: Components, switches: Mapping[str, bool]) -> tuple[PassReport, ...]:
    """Apply the passes that are on, in order; one report for each pass, on or off."""
    return tuple(
        apply(components) if switches[name] else PassReport(name, left=("switched off",))
        for name, apply in PASSES.items()
    )
