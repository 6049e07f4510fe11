"""The latent variant of ADD's discriminator: heads on what a diffusion UNet makes of noised latents.

As in latent adversarial diffusion distillation (Sauer et al., arXiv 2403.12015): no decoder and no vision network, and
the noise level says which structure the discriminator looks at.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.diffusion import Schedule

from .condition import Condition
from .draws import Draws
from .networks import predict

UNET_FEATURES = "teacher-unet"
"""The name that chooses these features in place of a vision network's."""


class UNetFeatures(nn.Module):
    """The hidden states behind a diffusers UNet's down, middle and up blocks, as tokens; differentiable in the latents.

    Args:
        unet: frozen, shared with whoever else uses it.
        schedule: the UNet's.
        lowest, highest: the timesteps at which latents are noised are drawn uniformly from lowest … highest.
        sample: (1, C, h, w) latents and their `condition`, of one sample: with them the widths are found.

    Attributes:
        widths: channels of each block's tokens.
    """

    def __init__(
        self, unet: nn.Module, schedule: Schedule, lowest: int, highest: int, sample: Tensor, condition: Condition
    ) -> None:
        super().__init__()
        if not 0 <= lowest <= highest < len(schedule):
            raise ValueError(
                f"feature_timesteps: needed 0 <= lowest <= highest <= {len(schedule) - 1}; got {lowest}, {highest}"
            )
        self.unet, self.schedule, self.lowest, self.highest = unet, schedule, lowest, highest
        middle = [] if getattr(unet, "mid_block", None) is None else [unet.mid_block]
        self._blocks = [*unet.down_blocks, *middle, *unet.up_blocks]
        with torch.no_grad():
            tokens = self.tokens(sample, torch.full((1,), lowest, device=sample.device), condition)
        self.widths = tuple(each.shape[1] for each in tokens)

    def forward(self, latents: Tensor, condition: Condition, draws: Draws) -> tuple[Tensor, ...]:
        """(B, C_k, L_k) per block, of latents (B, C, h, w) noised at timesteps of their own."""
        t = draws.randint(self.lowest, self.highest + 1)
        noise = draws.randn(*latents.shape[1:]).to(latents)
        return self.tokens(diffusion.add_noise(latents, noise, *self.schedule.at(t)), t, condition)

    def tokens(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        """(B, C_k, L_k) per block, of noised latents x_t (B, C, h, w) at timesteps t (B,)."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, given: object, made: Tensor | tuple) -> None:
            seen.append((made if isinstance(made, Tensor) else made[0]).flatten(2))

        hooks = [block.register_forward_hook(keep) for block in self._blocks]
        try:
            predict(self.unet, x_t, t, condition)
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(seen)
