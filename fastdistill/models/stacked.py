"""Two UNets in series, made from one: the student of InstaFlow-1.7B (Liu et al., arXiv 2309.06380).

The paper removes the modules that are redundant where the two meet, without saying which. Here it is by default what
only translates between features and latents: the first's output head and the second's input convolution. The features
(320 channels of Stable Diffusion's UNet) go straight through, and are the second's first skip connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

SEAM = ("first.conv_norm_out", "first.conv_act", "first.conv_out", "second.conv_in")
"""What can be removed where the two meet, and by default is."""


class StackedUNet(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """`second(first(x, t, text), t, text)`, called, configured, saved and trained like a `UNet2DConditionModel`.

        student = StackedUNet.from_unet(pipeline.unet)
        pipeline.unet = student  # and pipeline.save_pretrained(folder)

    Both halves see the same timestep, text and further conditions. `config` is that of the UNet, with `removed`.

    Args:
        removed: of `SEAM`. `conv_out` and `conv_in` go or stay together; when they stay, latents pass the seam. Without
            them, `conv_norm_out` and `conv_act` may stay: normalised features pass then. `conv_act` goes with
            `conv_norm_out`, as in diffusers.
        **unet: arguments of `UNet2DConditionModel`, for both halves.

    Raises:
        ValueError: a `removed` that cannot be, or a UNet that changes its input in ways that a second one would repeat.
        TypeError: `unet` holds an argument that `UNet2DConditionModel` does not know.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = UNet2DConditionModel._no_split_modules
    _skip_layerwise_casting_patterns = UNet2DConditionModel._skip_layerwise_casting_patterns
    _repeated_blocks = UNet2DConditionModel._repeated_blocks

    def __init__(self, removed: Iterable[str] = SEAM, **unet: object) -> None:
        super().__init__()
        removed = _checked(removed, unet)
        self.first = UNet2DConditionModel(**unet)
        self.second = UNet2DConditionModel(**unet)
        self.register_to_config(removed=removed, **_settings(self.first.config))
        for name in removed:
            half, _, module = name.partition(".")
            # UNet2DConditionModel skips an output norm of None, with its activation.
            is_convolution = module in ("conv_in", "conv_out")
            setattr(self.get_submodule(half), module, torch.nn.Identity() if is_convolution else None)

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, removed: Iterable[str] = SEAM) -> StackedUNet:
        """Both halves start as copies of `unet`, on its device and in its dtypes; all parameters train.

        Attention processors are diffusers' own, whatever those of `unet` are. A UNet on the meta device gives a stack
        there, in no time and memory.

        Raises:
            TypeError: `unet` is no `UNet2DConditionModel`. ValueError: as for the class, or `unet` lacks weights that
                its configuration asks for (adapters that were not merged into it move them).
        """
        if not isinstance(unet, UNet2DConditionModel):
            raise TypeError(f"unet: {type(unet).__name__}; needed a diffusers.UNet2DConditionModel")
        with torch.device("meta"):  # what is not computed need not be thrown away, nor random numbers be drawn for it
            stacked = cls(removed, **_settings(unet.config))
        weights = unet.state_dict()
        for half in (stacked.first, stacked.second):
            needed = half.state_dict().keys()
            if missing := needed - weights.keys():
                raise ValueError(
                    f"unet: {len(missing)} of its weights are not where its configuration puts them, such as "
                    f"{min(missing)}; merge or remove adapters first"
                )
            half.load_state_dict({name: weights[name].detach().clone() for name in needed}, assign=True)
        return stacked.train(unet.training)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, object] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: tuple[Tensor, ...] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Arguments and result as of `UNet2DConditionModel`, each given to both halves.

        Raises:
            ValueError: residuals of a ControlNet or T2I adapter, which are made for one UNet.
        """
        residuals = {
            "down_block_additional_residuals": down_block_additional_residuals,
            "mid_block_additional_residual": mid_block_additional_residual,
            "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
        }
        for name, value in residuals.items():
            if value is not None:
                raise ValueError(f"{name}: two UNets in series have no one place for it; needed None")
        for half in (self.first, self.second):
            (sample,) = half(
                sample,
                timestep,
                encoder_hidden_states,
                class_labels=class_labels,
                timestep_cond=timestep_cond,
                attention_mask=attention_mask,
                cross_attention_kwargs=None if cross_attention_kwargs is None else dict(cross_attention_kwargs),
                added_cond_kwargs=added_cond_kwargs,
                encoder_attention_mask=encoder_attention_mask,
                return_dict=False,
            )
        return UNet2DConditionOutput(sample=sample) if return_dict else (sample,)

    @property
    def add_embedding(self) -> torch.nn.Module | None:
        """What SDXL's pipelines ask for the number of conditions."""
        return getattr(self.first, "add_embedding", None)

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, object], **kwargs: object) -> tuple[dict, dict, dict]:
        """diffusers' hook: which settings of a file are arguments. Those of a UNet, and `removed`."""
        settings = dict(config_dict)
        removed = kwargs.pop("removed", settings.pop("removed", SEAM))
        arguments, unused, hidden = UNet2DConditionModel.extract_init_dict(settings, **kwargs)
        return {"removed": removed, **arguments}, unused, hidden


def _settings(config: Mapping[str, object]) -> dict[str, object]:
    """A model's configuration without what diffusers notes for itself, such as its own version."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _checked(removed: Iterable[str], unet: Mapping[str, object]) -> list[str]:
    removed = [removed] if isinstance(removed, str) else list(removed)
    for name in removed:
        if name not in SEAM:
            raise ValueError(f"removed: {name!r} is not at the seam; known: {', '.join(SEAM)}")
    if ("first.conv_out" in removed) != ("second.conv_in" in removed):
        raise ValueError(f"removed={removed}: first.conv_out and second.conv_in go or stay together")
    if ("first.conv_norm_out" in removed) != ("first.conv_act" in removed):
        raise ValueError(f"removed={removed}: first.conv_norm_out and first.conv_act go or stay together")
    taken, given = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if "first.conv_out" not in removed and taken != given:
        raise ValueError(f"removed={removed}: second.conv_in takes {taken} channels, first.conv_out gives {given}")
    for name, refused in _SINGLE.items():
        if unet.get(name) in refused:
            raise ValueError(f"{name}={unet[name]!r}: made for one UNet; two in series do not have it")
    return removed


# What the second UNet would do to features that is meant for latents, and what holds more than weights.
_SINGLE = {
    "center_input_sample": (True,),
    "addition_embed_type": ("image_hint",),
    "attention_type": ("gated", "gated-text-image"),
}
