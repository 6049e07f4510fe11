"""LPIPS: a perceptual distance between images, from the features of a frozen network.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924. Conventions,
constants and names of weights are those of version 0.1 of the public `lpips` package. Neither its linear heads nor VGG
weights ship here: both are given by path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from fastdistill.ops import lpips_distance

from ._vgg16 import VGG16Features

# Mean and deviation of ImageNet (0.485 … and 0.229 …) for images in [-1, 1], as the public package rounds them.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

Backbone = Callable[[Tensor], Sequence[Tensor]]


class LPIPS(nn.Module):
    """The LPIPS distance of each pair of images, `LPIPS(backbone, weights)(x, y)` -> (B,).

        loss = LPIPS("vgg16_features.safetensors", "lpips_vgg_heads.safetensors", checkpoint=True)
        loss(generated, target).mean().backward()

    The backbone is frozen and stays in eval mode; gradients flow to the images (and to the heads, once they ask for
    them). Features go into `fastdistill.losses.lpips_distance`, which keeps nothing beside them.

    Args:
        backbone: what makes the features of (B, 3, H, W) images:
            a module or function that returns a list of (B, C, *spatial) tensors, one per layer;
            the path of a state dict of VGG16 with torchvision's names (`features.0.weight`, …; of the convolutions
            only) or the public package's (`net.slice1.0.weight`), which needs no torchvision;
            "vgg16" for torchvision's own pretrained network (needs `pip install torchvision`, downloads weights).
        weights: the linear heads: a list of (C,) or (1, C, 1, 1) tensors, one per layer; a state dict with the
            public names (`lin0.model.1.weight`, … (1, C, 1, 1); other keys are ignored); the path of one; or None for
            a weight of 1 everywhere, the public package's baseline without learned heads.
        normalize: whether images are in [0, 1], and are brought to [-1, 1] first.
        scale: whether images are shifted and scaled by `SHIFT` and `SCALE`; False for a backbone that does its own.
        no_grad: "x" or "y" for the side whose features never get a gradient (a target that came out of a network,
            say); None for both getting one, where an input asks for it.
        checkpoint: keep no activations inside the stages of the backbone and compute each stage again in the backward.
            Needs a backbone with `stages`, an iterable of modules each of which takes the features of the one before;
            VGG16 has them.
        allow_pickle: also open files that are not safetensors, by `torch.load(weights_only=True)`. That reads tensors
            alone, but trusts the file to be no attack on the unpickler: leave it off for files of unknown origin.

    Attributes:
        heads: the weights of the heads as parameters (1, C, 1, 1), without gradient until `requires_grad_()`; in
            `state_dict` under their public names. Empty where `weights` is None.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: a backbone or weights that cannot be used; says which
            and what would do.
    """

    def __init__(
        self,
        backbone: Backbone | str | Path,
        weights: Sequence[Tensor] | Mapping[str, Tensor] | str | Path | None = None,
        *,
        normalize: bool = False,
        scale: bool = True,
        no_grad: str | None = None,
        checkpoint: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__()
        if no_grad not in (None, "x", "y"):
            raise ValueError(f'no_grad: expected "x", "y" or None, got {no_grad!r}')
        self.backbone = _backbone(backbone, allow_pickle)
        if isinstance(self.backbone, nn.Module):
            self.backbone.requires_grad_(False).eval()
        if checkpoint and not hasattr(self.backbone, "stages"):
            raise ValueError(
                f"checkpoint: {type(self.backbone).__name__} has no `stages`; give it the modules whose outputs are "
                "its features, one after the other, or checkpoint inside it"
            )
        self.normalize, self.scale, self.no_grad, self.checkpoint = normalize, scale, no_grad, checkpoint
        self._layers = 0
        for index, weight in enumerate(_head_weights(weights, allow_pickle)):
            self.add_module(f"lin{index}", _Head(weight))
            self._layers += 1
        for name, values in (("shift", SHIFT), ("deviation", SCALE)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @property
    def heads(self) -> list[nn.Parameter]:
        return [self.get_submodule(f"lin{index}").model[1].weight for index in range(self._layers)]

    def train(self, mode: bool = True) -> LPIPS:
        """The backbone stays in eval mode: a metric does not depend on the rest of its batch."""
        super().train(mode)
        if isinstance(self.backbone, nn.Module):
            self.backbone.eval()
        return self

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance of each pair, (B,) float32, 0 where they are equal.

        Args:
            x, y: (B, 3, H, W) images of one shape, in [-1, 1], or in [0, 1] with `normalize`.
        """
        for name, image in (("x", x), ("y", y)):
            if not isinstance(image, Tensor) or not image.is_floating_point():
                raise TypeError(f"{name}: expected a floating tensor, got {getattr(image, 'dtype', type(image))}")
            if image.dim() != 4 or image.shape[1] != 3:
                raise ValueError(f"{name}: expected (B, 3, H, W) images, got {tuple(image.shape)}")
        if x.shape != y.shape:
            raise ValueError(f"y: expected the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
        of_x, of_y = self._features(x, "x"), self._features(y, "y")
        weights = self.heads or [f.new_ones(f.shape[1], dtype=torch.float32) for f in of_x]
        if len(weights) != len(of_x):
            raise ValueError(f"backbone: returned {len(of_x)} layers of features for {len(weights)} heads")
        return lpips_distance(of_x, of_y, weights)

    def _features(self, image: Tensor, name: str) -> list[Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and name != self.no_grad):
            if self.normalize:
                image = 2 * image - 1
            if self.scale:
                image = (image - self.shift.to(image.dtype)) / self.deviation.to(image.dtype)
            if not self.checkpoint:
                features = self.backbone(image)
                return [features] if isinstance(features, Tensor) else list(features)
            features = []
            for stage in self.backbone.stages:
                image = recomputed(stage, image, use_reentrant=False, preserve_rng_state=False)
                features.append(image)
            return features


class _Head(nn.Module):
    """One linear head, under the public package's name: `model.1.weight`, behind what was a dropout in its training."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        head = nn.utils.skip_init(nn.Conv2d, weight.numel(), 1, 1, bias=False)
        head.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True), requires_grad=False)
        self.model = nn.Sequential(nn.Identity(), head)


def _backbone(backbone: Backbone | str | Path, allow_pickle: bool) -> Backbone:
    if backbone == "vgg16":
        return VGG16Features.from_torchvision()
    if isinstance(backbone, (str, Path)):
        return VGG16Features.from_state_dict(_read(backbone, "backbone", allow_pickle))
    if not callable(backbone):
        raise TypeError(
            'backbone: expected a module or function that returns a list of features, "vgg16", or the path of a state '
            f"dict of VGG16; got {type(backbone).__name__}"
        )
    return backbone


def _head_weights(weights, allow_pickle: bool) -> Iterable[Tensor]:
    if weights is None:
        return []
    if isinstance(weights, (str, Path)):
        weights = _read(weights, "weights", allow_pickle)
    if isinstance(weights, Mapping):
        weights = _named_heads(weights)
    heads = []
    for index, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise TypeError(f"weights[{index}]: expected a tensor, got {type(weight).__name__}")
        if weight.numel() == 0 or weight.numel() != weight.shape[min(1, weight.dim() - 1)]:
            raise ValueError(f"weights[{index}]: expected (C,) or (1, C, 1, 1), got {tuple(weight.shape)}")
        heads.append(weight.reshape(1, -1, 1, 1))
    if not heads:
        raise ValueError("weights: needs at least one layer, got none; None for a weight of 1 everywhere")
    return heads


def _named_heads(state: Mapping[str, Tensor]) -> list[Tensor]:
    found = {}
    for name, value in state.items():
        # Without dropout the public package's heads are its model's first layer.
        if match := re.fullmatch(r"lin(\d+)\.model\.[01]\.weight", name):
            found[int(match[1])] = value
    if sorted(found) != list(range(len(found))) or not found:
        raise ValueError(
            "weights: expected the public package's keys lin0.model.1.weight, lin1.model.1.weight, … without a gap; "
            f"got {', '.join(list(state)[:6]) or 'no key'}"
        )
    return [found[index] for index in range(len(found))]


def _read(path: str | Path, argument: str, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: no file {str(path)!r}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if not allow_pickle:
        raise ValueError(
            f"{argument}: {path.name!r} is not a .safetensors file. allow_pickle=True opens it by "
            "torch.load(weights_only=True), for a file that you trust; or convert it once with "
            "safetensors.torch.save_file"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        raise ValueError(f"{argument}: {path.name!r} holds a {type(state).__name__}, needed a state dict")
    return dict(state)
