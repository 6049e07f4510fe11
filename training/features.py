"""The frozen network in whose features ADD's discriminator sees images: any vision transformer.

StyleGAN-T's projected discriminator (Sauer et al., arXiv 2301.09515), as ADD uses it (arXiv 2311.17042): the tokens of
the patch embedding and of blocks spread over the depth, with the class token's readout added to the patches'.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING = -1
"""The number of the patch embedding (with positions) among the layers; blocks count from 0."""

Statistics = Sequence[float]


class Features(NamedTuple):
    """Of a batch of images.

    Attributes:
        tokens: K tensors (B, C, L), one per layer: the patches', each with the class token of that layer added.
        embedding: (B, C) the class token after the last block and the final norm.
    """

    tokens: tuple[Tensor, ...]
    embedding: Tensor


class FeatureNetwork(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to `Features`, differentiable in the images; nothing in it ever trains.

    Its parameters need no gradient, and it stays in evaluation mode whatever `train()` says, so that nothing is
    computed twice and no buffer changes. Images of another size are resized to the network's (bilinear, antialiased),
    and normalised with its statistics.

    Args:
        vit: the transformer, which is frozen here.
        read: what `vit` makes of normalised pixels (B, 3, S, S): the final embedding (B, C).
        blocks: its blocks, in order. Each is called with tokens (B, P + L, C) first, and returns them, or a tuple that
            begins with them.
        prefix: P tokens in front of the patches', the class token first, then registers.
        width: C.
        size: S, pixels of a side; None calls it at the size that the images have.
        mean, std: of each channel of pixels in [0, 1].
        layers: numbers of blocks, from 0, and EMBEDDING; None is `spread(len(blocks))`.

    Attributes:
        widths: channels C of each layer's tokens.
        width: of the embedding.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vit: nn.Module,
        read: Callable[[nn.Module, Tensor], Tensor],
        blocks: Callable[[nn.Module], Sequence[nn.Module]],
        *,
        prefix: int,
        width: int,
        size: int | None,
        mean: Statistics,
        std: Statistics,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self._read, self._blocks, self.prefix = read, blocks, prefix
        self.layers = checked_layers(layers, len(blocks(vit)))
        self.width, self.widths, self.size = width, (width,) * len(self.layers), size
        self.register_buffer("mean", _per_channel("mean", mean), persistent=False)
        self.register_buffer("std", _per_channel("std", std), persistent=False)
        if hasattr(vit, "set_grad_checkpointing"):  # timm's; transformers' is off in evaluation mode
            vit.set_grad_checkpointing(False)
        self.eval()

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Always evaluation mode: dropout or stochastic depth would be noise in the discriminator."""
        return super().train(False)

    def forward(self, images: Tensor) -> Features:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images: {tuple(images.shape)} {images.dtype}; needed (B, 3, H, W), floating, in [-1, 1]")
        with _outputs(self._blocks(self.vit), self.layers) as seen:
            embedding = self._read(self.vit, self.pixels(images))
        return Features(tuple(self._readout(seen[layer]) for layer in self.layers), embedding)

    def pixels(self, images: Tensor) -> Tensor:
        """What the transformer is shown: resized and normalised, in its dtype."""
        images = images.to(next(self.vit.parameters()).dtype)
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            size = (self.size, self.size)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return ((images + 1) / 2 - self.mean.to(images)) / self.std.to(images)

    def _readout(self, tokens: Tensor) -> Tensor:
        """(B, P + L, C) to (B, C, L)."""
        return (tokens[:, self.prefix :] + tokens[:, :1]).transpose(1, 2)


def build_features(
    source: str | Path | nn.Module,
    *,
    layers: Sequence[int] | None = None,
    size: int | None = None,
    mean: Statistics | None = None,
    std: Statistics | None = None,
) -> nn.Module:
    """A frozen feature network.

    Args:
        source: one of

            - "digits-vit", which ships with the package, for 32x32 digits;
            - a folder or a name of the Hugging Face hub that transformers opens: ViT (DINO), DINOv2 with and without
              registers, DINOv3, or the vision half of CLIP, as "facebook/dino-vits16";
            - "timm:NAME", a vision transformer of timm with its pretrained weights, as
              "timm:vit_small_patch16_224.dino", or "timm:" in front of anything else that `timm.create_model` takes;
            - a module: a vision transformer of transformers or of timm, or one of your own that has `widths` (channels
              of each layer) and `width` (of the embedding), and returns `Features` of images in [-1, 1].
        layers: numbers of blocks, from 0, and EMBEDDING (-1) for the patch embedding; None spreads four over the depth
            and takes the embedding: of 12 blocks EMBEDDING, 2, 5, 8, 11 (arXiv 2301.09515).
        size: pixels of a side that images are resized to; None is what the network's image processor says, or else its
            configuration. Another size than it was trained at needs a network that interpolates its positions.
        mean, std: per channel of pixels in [0, 1]; None is what the image processor says.

    Returns:
        A `FeatureNetwork`, or the module of your own, frozen and in evaluation mode.

    Raises:
        ValueError: no such network, one without class token or blocks, a number of a block that it does not have, or
            no statistics: no image processor stands beside the weights and none are given.
        ImportError: transformers or timm is needed and cannot be imported; the message says what to install.
    """
    given = {"layers": layers, "size": size, "mean": mean, "std": std}
    if isinstance(source, nn.Module):
        return _of_module(source, given)
    if str(source).startswith("timm:"):
        return _of_timm(_timm_model(str(source).removeprefix("timm:")), given)
    vit, processor = _from_transformers(source)
    return _of_transformers(vit, processor, given)


def untrained_features(source: str | Path) -> nn.Module:
    """What `build_features` makes of a name or a folder, with random weights: of their configuration alone, for plans.

    Raises: as `build_features`.
    """
    given = dict.fromkeys(("layers", "size", "mean", "std"))
    if str(source).startswith("timm:"):
        return _of_timm(_timm_model(str(source).removeprefix("timm:"), pretrained=False), given)
    vit, processor = _from_transformers(source, pretrained=False)
    return _of_transformers(vit, processor, given)


def spread(depth: int, count: int = 4) -> tuple[int, ...]:
    """The embedding and `count` blocks at equal distances, the last one included: EMBEDDING, 2, 5, 8, 11 of 12."""
    return (EMBEDDING, *sorted({max(depth * (i + 1) // count - 1, 0) for i in range(count)}))


def checked_layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """`layers`, or the spread; a ValueError if one of them is not there or is named twice."""
    chosen = spread(depth) if layers is None else tuple(layers)
    if not chosen or len(set(chosen)) < len(chosen) or not all(EMBEDDING <= layer < depth for layer in chosen):
        raise ValueError(
            f"layers: {list(chosen)}; needed different numbers from {EMBEDDING} to {depth - 1}, one or more"
        )
    return chosen


@contextmanager
def _outputs(blocks: Sequence[nn.Module], layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Within, the tokens that leave the blocks of `layers` are noted, and for EMBEDDING those that reach the first."""
    seen: dict[int, Tensor] = {}

    def note(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def note_input(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen[EMBEDDING] = inputs[0] if inputs else keywords["hidden_states"]

    handles = [blocks[layer].register_forward_hook(note(layer)) for layer in layers if layer != EMBEDDING]
    handles.append(blocks[0].register_forward_pre_hook(note_input, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _per_channel(name: str, values: Statistics) -> Tensor:
    tensor = torch.as_tensor(values, dtype=torch.float32)
    if tensor.shape != (3,):
        raise ValueError(f"{name}: {tuple(tensor.shape)}; needed three numbers, one per channel")
    return tensor.reshape(1, 3, 1, 1)


# ---- networks of transformers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Processor:
    """What an image processor says: pixels of a side, mean and deviation per channel; None where it says nothing."""

    size: int | None = None
    mean: Statistics | None = None
    std: Statistics | None = None


def _of_module(module: nn.Module, given: dict[str, Any]) -> nn.Module:
    if hasattr(module, "widths") and hasattr(module, "width"):
        refused = [name for name, value in given.items() if value is not None]
        if refused:
            raise ValueError(f"{', '.join(refused)}: not for a module that already gives features; needed None")
        return module.requires_grad_(False).eval()
    if hasattr(module, "num_prefix_tokens"):
        return _of_timm(module, given)
    if hasattr(getattr(module, "config", None), "num_hidden_layers") or hasattr(module, "vision_model"):
        return _of_transformers(module, _Processor(), given)
    raise ValueError(
        f"features: a {type(module).__name__}; needed a vision transformer of transformers or timm, or a module with "
        "`widths` and `width` that returns Features"
    )


def _from_transformers(source: str | Path, pretrained: bool = True) -> tuple[nn.Module, _Processor]:
    from fastdistill.models import bundled_networks
    from fastdistill.models.loading import quiet_libraries

    place = bundled_networks().get(str(source), source)
    try:
        with quiet_libraries():
            from transformers import AutoConfig, AutoModel, CLIPVisionModel, ViTModel
            from transformers.image_processing_utils import BaseImageProcessor

            config = AutoConfig.from_pretrained(place)
            # The pooler of a ViT is not read here, and most checkpoints (DINO's) hold none.
            if not pretrained:
                kinds = {"vit": partial(ViTModel, add_pooling_layer=False), "clip_vision_model": CLIPVisionModel}
                of_clip = config.model_type == "clip"
                config = config.vision_config if of_clip else config
                vit = kinds.get("clip_vision_model" if of_clip else config.model_type, AutoModel.from_config)(config)
            elif config.model_type == "vit":
                vit = ViTModel.from_pretrained(place, add_pooling_layer=False)
            elif config.model_type in ("clip", "clip_vision_model"):
                vit = CLIPVisionModel.from_pretrained(place)
            else:
                vit = AutoModel.from_pretrained(place)
            try:
                facts, _ = BaseImageProcessor.get_image_processor_dict(place)
            except OSError:
                facts = {}
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"features: {str(source)!r}: transformers cannot open it: {reason}") from error
    return vit, _Processor(_side(facts), facts.get("image_mean"), facts.get("image_std"))


def _side(facts: dict[str, Any]) -> int | None:
    """Of the square that a processor ends with: it crops last."""
    size = (facts.get("crop_size") if facts.get("do_center_crop", True) else None) or facts.get("size")
    if isinstance(size, dict):
        return size.get("height") or size.get("shortest_edge")
    return size


def _of_transformers(vit: nn.Module, processor: _Processor, given: dict[str, Any]) -> FeatureNetwork:
    base = getattr(vit, "base_model", vit)
    vit = vit if _class_token(base) is None else base  # without a classifier's head; DINOv3's base lacks its embeddings
    vit = getattr(vit, "vision_model", vit)  # CLIP's two halves, and in transformers 4 the half itself is wrapped
    config = vit.config
    blocks = _block_finder(vit, config.num_hidden_layers)
    if _class_token(vit) is None:
        raise ValueError(f"features: a {type(vit).__name__} has no class token; needed one, for readout and embedding")
    size = given["size"] or processor.size or config.image_size
    if not isinstance(size, int):
        size = next(iter(size))
    options = {}
    if size != config.image_size and "interpolate_pos_encoding" in inspect.signature(vit.forward).parameters:
        options["interpolate_pos_encoding"] = True
    pooled = config.model_type.startswith("clip")  # its pooler is the final norm of the class token

    def read(network: nn.Module, pixels: Tensor) -> Tensor:
        output = network(pixel_values=pixels, **options)
        return output.pooler_output if pooled else output.last_hidden_state[:, 0]

    return FeatureNetwork(
        vit,
        read,
        blocks,
        prefix=1 + (getattr(config, "num_register_tokens", 0) or 0),
        width=config.hidden_size,
        size=size,
        mean=_needed("mean", given, processor.mean),
        std=_needed("std", given, processor.std),
        layers=given["layers"],
    )


def _block_finder(vit: nn.Module, depth: int) -> Callable[[nn.Module], Sequence[nn.Module]]:
    """By the name of the list that holds them, which differs between families and versions."""
    names = [name for name, part in vit.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    if not names:
        raise ValueError(f"features: a {type(vit).__name__} has no list of {depth} blocks; needed a vision transformer")
    return lambda network: network.get_submodule(names[0])


def _class_token(vit: nn.Module) -> Tensor | None:
    named = {name.rpartition(".")[2]: p for name, p in vit.named_parameters()}
    return named.get("cls_token", named.get("class_embedding"))


def _needed(name: str, given: dict[str, Any], found: Statistics | None) -> Statistics:
    value = given[name] if given[name] is not None else found
    if value is None:
        raise ValueError(f"{name}: no image processor stands beside the network; give {name}, per channel in [0, 1]")
    return value


# ---- networks of timm -----------------------------------------------------------------------------------------------


def _timm_model(name: str, pretrained: bool = True) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises the latter
        raise ImportError(
            f'"timm:{name}" needs timm, which cannot be imported ({error}): pip install "fastdistill[features]"'
        ) from error
    try:
        return timm.create_model(name, pretrained=pretrained)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"features: timm cannot make {name!r}: {error}") from error


def _of_timm(vit: nn.Module, given: dict[str, Any]) -> FeatureNetwork:
    if not hasattr(vit, "blocks") or getattr(vit, "num_prefix_tokens", 0) < 1:
        raise ValueError(f"features: timm's {type(vit).__name__} has no blocks or no class token; needed both")
    facts = vit.pretrained_cfg
    return FeatureNetwork(
        vit,
        lambda network, pixels: network.forward_features(pixels)[:, 0],
        lambda network: network.blocks,
        prefix=vit.num_prefix_tokens,
        width=vit.num_features,
        size=given["size"] or facts["input_size"][-1],
        mean=_needed("mean", given, facts.get("mean")),
        std=_needed("std", given, facts.get("std")),
        layers=given["layers"],
    )
