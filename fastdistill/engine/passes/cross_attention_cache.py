"""Keys and values of all cross-attentions, projected from a prompt by one product and kept.

They depend on the prompt alone: not on the image, the timestep or the seed. What the UNet is given as its context is
then all of them side by side, of which each cross-attention reads its columns.
"""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from fastdistill.engine.attention import DirectAttention
from fastdistill.engine.components import Components
from fastdistill.engine.context import CrossAttentionCache
from fastdistill.engine.report import PassReport

CAPACITY = 16  # prompts; of SD 1.5 4 MB each in 16 bit, of SDXL 26


def apply(components: Components) -> PassReport:
    name = "cross_attention_cache"
    modules = list(components.unet.modules())
    others = sum(isinstance(module, (Attention, Transformer2DModel)) for module in modules)
    if others:
        reason = f"{others} modules of the UNet may read the prompt itself (direct_attention has not rewritten them)"
        return PassReport(name, left=(reason,))
    attentions = [module for module in modules if isinstance(module, DirectAttention) and module.cross]
    if not attentions:
        return PassReport(name, left=("the UNet has no cross-attention",))
    if len({attention.joint.weight.shape[1] for attention in attentions}) > 1:
        return PassReport(name, left=("the cross-attentions read contexts of different widths",))
    # Without the prompt cache every call encodes anew, and a new tensor is a new prompt.
    kept = min(CAPACITY, components.prompt_cache) if components.prompt_cache else 0
    components.context = CrossAttentionCache(attentions, kept)
    changed = {"cross-attention with keys and values from one product for all": len(attentions)}
    if kept:
        changed[f"cache of the {kept} prompts used last"] = 1
        return PassReport(name, changed)
    return PassReport(name, changed, ("kept from call to call: prompt_cache is off",))
