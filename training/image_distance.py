"""A distance between samples that is taken of the images which they are decoded to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ImageDistance:
    """The mean distance between images of samples and of their targets, each (B, ...); no gradient reaches the targets.

    Attributes:
        decode: samples to images (B, 3, H, W).
        distance: of images, a tensor whose mean is taken.
        networks: those that `decode` and `distance` use, by their names as roles; they receive no gradient.
        by_sample: whether the gradient is taken sample by sample, so that one sample's graph is all that is kept. The
            decoder's activations are most of what such a loss takes; nothing is computed twice for it.
    """

    decode: Callable[[Tensor], Tensor]
    distance: Distance
    networks: dict[str, nn.Module] = field(default_factory=dict)
    by_sample: bool = False

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        if self.by_sample and x.requires_grad and torch.is_grad_enabled():
            return _MeanBySample.apply(x, target, self._mean)
        return self._mean(x, target)

    def _mean(self, x: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.decode(target)
        return self.distance(self.decode(x), target).mean()


class _MeanBySample(torch.autograd.Function):
    """Forward computes the gradient too, and keeps it: it is as large as the samples."""

    @staticmethod
    def forward(ctx, x: Tensor, target: Tensor, mean: Distance) -> Tensor:
        losses, gradients = [], []
        for one, its_target in zip(x.detach().split(1), target.split(1)):
            one.requires_grad_()
            with torch.enable_grad():
                loss = mean(one, its_target)
            # Backward passes run outside of autocast.
            with torch.autocast(x.device.type, enabled=False):
                loss.backward(inputs=(one,))
            gradients.append(one.grad)
            losses.append(loss.detach())
        ctx.save_for_backward(torch.cat(gradients) / len(x))
        return torch.stack(losses).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None
