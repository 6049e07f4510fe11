"""diffusers' `ResnetBlock2D` as the passes need it: exchangeable norms, and a time embedding that can be a bias."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistill.engine.norm import SeparateNormSiLU


class ResidualBlock(torch.nn.Module):
    """`shortcut(x) + conv2(norm2(conv1(norm1(x)) + time))`, norms followed by SiLU, over `output_scale`.

    Shares all parameters of the block it is made from. `norm1` and `norm2` are called as `norm(x, add)`.

    Attributes:
        bias_index: None, or the place of this block's bias in the tuple that comes as `temb`: then conv1's own bias and
            the projected time embedding are in it already.
    """

    def __init__(self, block) -> None:
        """From a `ResnetBlock2D` for which `why_not_residual` has nothing to say."""
        super().__init__()
        self.norm1, self.norm2 = SeparateNormSiLU(block.norm1), SeparateNormSiLU(block.norm2)
        self.conv1, self.conv2, self.conv_shortcut = block.conv1, block.conv2, block.conv_shortcut
        self.time_emb_proj = block.time_emb_proj
        self.activate_time = not block.skip_time_act
        self.output_scale = float(block.output_scale_factor)
        self.bias_index: int | None = None

    def forward(self, x: Tensor, temb: Tensor | tuple[Tensor, ...] | None = None) -> Tensor:
        h = self.norm1(x)
        if self.bias_index is not None:
            conv = self.conv1
            h = F.conv2d(h, conv.weight, temb[self.bias_index], conv.stride, conv.padding, conv.dilation, conv.groups)
            h = self.norm2(h)
        elif self.time_emb_proj is not None:
            h = self.norm2(self.conv1(h), self.project_time(temb))
        else:
            h = self.norm2(self.conv1(h))
        h = self.conv2(h)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        h = x + h
        return h if self.output_scale == 1 else h / self.output_scale

    def project_time(self, temb: Tensor) -> Tensor:
        """(B, C) what the time embedding (B, D) adds to every pixel after conv1."""
        return self.time_emb_proj(F.silu(temb) if self.activate_time else temb)
