"""DMD2's fake score: a score network whose middle also tells real samples from the student's (arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .condition import Condition
from .networks import predict


class FakeScore(nn.Module):
    """A score network, and a head on the features of its `mid_block`. One module: one role, one optimiser.

    Called as the network is called, and returning what it returns.

    Args:
        network: a diffusers UNet, or anything called like one that has a `mid_block`.
        head: from the features of the mid block, (B, C, h, w) of a UNet, to logits (B, ...).

    Raises:
        ValueError: a network without a mid block.
    """

    forward_methods = ("predict_with_logits", "logits")
    """Passes beside `forward`, before which a sharded network gathers its parameters (`training/sharding.py`)."""

    def __init__(self, network: nn.Module, head: nn.Module) -> None:
        super().__init__()
        if getattr(network, "mid_block", None) is None:
            raise ValueError(f"{type(network).__name__} has no mid_block, on which the GAN's head stands")
        self.network, self.head = network, head

    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs)

    def predict_with_logits(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Of one pass: the prediction (B, ...), and the head's logits."""
        with _output_of(self.network.mid_block) as features:
            pred = predict(self.network, x_t, t, condition)
        return pred, self.head(features[0])

    def logits(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The head's logits alone, by a pass that ends behind the mid block."""
        with _output_of(self.network.mid_block, stop=True) as features:
            predict(self.network, x_t, t, condition)
        return self.head(features[0])


def mid_block_head(unet: nn.Module) -> nn.Module:
    """From the mid block's (B, C, h, w) to logits (B, 1, ...), one of each 4x4 that is left after halving.

    One logit per image at the size that the UNet was made for: 16x16 (SDXL) and 8x8 (Stable Diffusion 1) are halved
    down to 4x4, as in the paper's public code.
    """
    channels = unet.config.block_out_channels[-1]
    size = unet.config.sample_size
    size = min((size, size) if isinstance(size, int) else size) >> (len(unet.config.block_out_channels) - 1)
    layers = []
    while size > 4:
        layers += _layer(channels, kernel=4, stride=2, padding=1)
        size //= 2
    layers += _layer(channels, kernel=size, stride=size, padding=0)
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))


def _layer(channels: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
    groups = channels // 8 if channels % 8 == 0 else 1
    return [nn.Conv2d(channels, channels, kernel, stride, padding), nn.GroupNorm(min(groups, 32), channels), nn.SiLU()]


class _Reached(Exception):
    """Ends a forward pass; never leaves this file."""


@contextmanager
def _output_of(module: nn.Module, stop: bool = False) -> Iterator[list[Tensor]]:
    """Collects what `module` returns within the block; with `stop` nothing behind it is computed.

    A hook and not a forward of our own: whatever a UNet does with its conditions before the mid block is done.
    """
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        outputs.append(output)
        if stop:
            raise _Reached

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    except _Reached:
        pass
    finally:
        handle.remove()
