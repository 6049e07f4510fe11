"""ADD's discriminator: light heads on the features of a frozen network, conditioned by projection.

The heads are those of StyleGAN-T (Sauer et al., arXiv 2301.09515), conditioned on text and image as in adversarial
diffusion distillation (arXiv 2311.17042, section 3). They are all that trains: where the features come from is the
feature network's affair, and R1 is taken at what a head is given.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

PROJECTION = 64  # channels in which features and condition are compared
KERNEL = 9  # of the residual block, along the tokens


class Discriminator(nn.Module):
    """One head per feature layer.

    Args:
        widths: channels of each feature layer.
        condition_width: of the condition's vector; 0 for none.

    Example:
        >>> heads = Discriminator([64, 64], condition_width=32)
        >>> logits = heads([torch.randn(8, 64, 49), torch.randn(8, 64, 49)], torch.randn(8, 32))
        >>> [tuple(each.shape) for each in logits]
        [(8, 49), (8, 49)]
    """

    def __init__(self, widths: Sequence[int], condition_width: int = 0) -> None:
        super().__init__()
        if not widths:
            raise ValueError("widths: a discriminator needs one feature layer or more; got none")
        self.heads = nn.ModuleList(Head(width, condition_width) for width in widths)

    def forward(self, features: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        """Logits (B, L_k) of every head k.

        Args:
            features: one tensor (B, C_k, L_k) per head, float32: channels, then tokens.
            condition: (B, `condition_width`), or None without one.

        Raises:
            ValueError: another number of layers than of heads, a condition that is missing or not expected, or a batch
                that `BatchNormLocal` cannot divide.
        """
        if len(features) != len(self.heads):
            raise ValueError(f"features: {len(features)} layers; these heads were made for {len(self.heads)}")
        return [head(each, condition) for head, each in zip(self.heads, features)]


class Head(nn.Module):
    """Features (B, C, L) of one layer, and a condition, to logits (B, L)."""

    def __init__(self, channels: int, condition_width: int = 0) -> None:
        super().__init__()
        self.block = ConvBlock(channels, 1)
        self.residual = ConvBlock(channels, KERNEL)
        self.out = spectral_norm(nn.Conv1d(channels, PROJECTION if condition_width else 1, 1))
        self.project = nn.Linear(condition_width, PROJECTION) if condition_width else None

    def forward(self, features: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.block(features)
        out = self.out((self.residual(h) + h) / math.sqrt(2))
        if (condition is None) != (self.project is None):
            needed = "one" if condition is None else "none"
            raise ValueError(f"condition: got {'none' if condition is None else 'one'}; this head needs {needed}")
        if condition is None:
            return out.squeeze(1)
        return (out * self.project(condition)[:, :, None]).sum(1) / math.sqrt(PROJECTION)


class ConvBlock(nn.Sequential):
    """Spectral-norm convolution along the tokens, circularly padded; BatchNormLocal; LeakyReLU."""

    def __init__(self, channels: int, kernel: int) -> None:
        conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
        super().__init__(spectral_norm(conv), BatchNormLocal(channels), nn.LeakyReLU(0.2))


class BatchNormLocal(nn.Module):
    """Batch normalisation over groups of at most `virtual_batch` samples, as in StyleGAN-T: no running statistics.

    A batch of B makes `ceil(B / virtual_batch)` groups of samples that follow one another, each normalised over its
    samples and tokens. So the statistics are as noisy at any batch size and on any number of GPUs.
    """

    def __init__(self, channels: int, virtual_batch: int = 8, eps: float = 1e-5) -> None:
        super().__init__()
        self.virtual_batch, self.eps = virtual_batch, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, L) to the same shape.

        Raises:
            ValueError: B is not divisible by its number of groups.
        """
        grouped = x.reshape(groups_of(len(x), self.virtual_batch), -1, *x.shape[1:])
        mean = grouped.mean((1, 3), keepdim=True)
        variance = grouped.var((1, 3), keepdim=True, unbiased=False)
        normalised = ((grouped - mean) * torch.rsqrt(variance + self.eps)).reshape(x.shape)
        return normalised * self.weight[:, None] + self.bias[:, None]


def groups_of(batch_size: int, virtual_batch: int = 8) -> int:
    """How many groups `BatchNormLocal` makes of a batch.

    A batch of one warns: normalised over itself alone, and judged by a hinge against a single other sample, it teaches
    next to nothing.

    Raises:
        ValueError: the batch is not divisible by the number of groups.
    """
    if batch_size == 1:
        warnings.warn(
            "a batch of 1: BatchNormLocal normalises each sample by itself and the hinge compares single samples; "
            "use a batch of 2 or more, better 8",
            stacklevel=2,
        )
    groups = max(1, math.ceil(batch_size / virtual_batch))
    if batch_size % groups:
        fits = next(size for size in range(batch_size, 0, -1) if size % math.ceil(size / virtual_batch) == 0)
        raise ValueError(
            f"batch size {batch_size} makes {groups} groups of at most {virtual_batch} for BatchNormLocal and is not "
            f"divisible by {groups}; the next smaller that is: {fits}; any multiple of {virtual_batch} is"
        )
    return groups
