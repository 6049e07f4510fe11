"""What an architecture is: the classes and configurations of a pipeline's components, and the sizes they imply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..loading import ModelError

if TYPE_CHECKING:
    import torch

TEXT_TOKENS = 77
TIME_IDS = 6  # SDXL's: original height and width, top and left of the crop, target height and width


@dataclass(frozen=True)
class Component:
    """A class of `library` ("diffusers" or "transformers") and its configuration; what is not named has its default."""

    library: str
    class_name: str
    config: Mapping[str, object]


@dataclass(frozen=True)
class Tokenizer:
    """A `CLIPTokenizer`: its vocabulary, "clip" or "small", and the token that prompts are filled with."""

    vocabulary: str
    pad_token: str


@dataclass(frozen=True)
class Architecture:
    """A text-to-image pipeline like Stable Diffusion 1, 2 or XL, without weights.

    Attributes:
        name: by which it is known, or the name of its folder.
        pipeline: class of diffusers.
        networks: `unet`, `vae`, `text_encoder` and SDXL's `text_encoder_2`, by the names that pipelines give them.
        scheduler: of diffusers.
        tokenizers: `tokenizer` and SDXL's `tokenizer_2`; none where the architecture is that of a folder.
        options: of the pipeline itself, as `force_zeros_for_empty_prompt`.
    """

    name: str
    pipeline: str
    networks: Mapping[str, Component]
    scheduler: Component
    tokenizers: Mapping[str, Tokenizer]
    options: Mapping[str, object]

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts, as its scheduler says: `epsilon`, `v_prediction` or `sample`."""
        return str(self.scheduler.config.get("prediction_type", "epsilon"))

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet takes pooled text and sizes."""
        return self._unet.get("addition_embed_type") == "text_time"

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** (len(self.networks["vae"].config.get("block_out_channels", (64,))) - 1)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent at the size that the UNet was made for.

        Raises:
            ModelError: the UNet's configuration names no size.
        """
        size = self._unet.get("sample_size")
        if size is None:
            raise ModelError(f"{self.name}: the UNet's configuration has no sample_size")
        height, width = (size, size) if isinstance(size, int) else size
        return int(self._unet.get("in_channels", 4)), height, width

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) in pixels of a picture at the size that the UNet was made for."""
        return tuple(side * self.pixels_per_latent for side in self.sample_shape[1:])

    @property
    def text_tokens(self) -> int:
        """Tokens of an encoded prompt."""
        return int(self.networks["text_encoder"].config.get("max_position_embeddings", TEXT_TOKENS))

    @property
    def text_width(self) -> int:
        """Width of the encoded tokens that the UNet attends to."""
        return int(self._unet.get("cross_attention_dim", 1280))

    @property
    def pooled_width(self) -> int | None:
        """Width of the pooled text that the UNet is given; None where it takes none."""
        if not self.is_sdxl:
            return None
        embedded = TIME_IDS * int(self._unet["addition_time_embed_dim"])
        return int(self._unet["projection_class_embeddings_input_dim"]) - embedded

    @property
    def _unet(self) -> Mapping[str, object]:
        return self.networks["unet"].config


def unet_inputs(architecture: str | Architecture, batch: int, resolution: int, dtype: torch.dtype) -> dict[str, object]:
    """Arguments of the UNet's forward: random latents of `resolution` pixels, and conditions of the right sizes.

    Made on torch's current device, and fake under a `FakeTensorMode`.

    Raises:
        ModelError: `architecture` is a name that is unknown.
        ValueError: `resolution` is not a multiple of the pixels per latent.
    """
    import torch

    if isinstance(architecture, str):
        from .registry import resolve_architecture

        architecture = resolve_architecture(architecture)
    scale = architecture.pixels_per_latent
    if resolution < scale or resolution % scale:
        raise ValueError(f"resolution={resolution}: must be a positive multiple of {scale} pixels")
    side = resolution // scale
    inputs: dict[str, object] = {
        "sample": torch.randn(batch, architecture.sample_shape[0], side, side, dtype=dtype),
        "timestep": torch.full((batch,), 999),
        "encoder_hidden_states": torch.randn(batch, architecture.text_tokens, architecture.text_width, dtype=dtype),
    }
    if architecture.is_sdxl:
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, architecture.pooled_width, dtype=dtype),
            "time_ids": torch.full((batch, TIME_IDS), float(resolution), dtype=dtype),
        }
    return inputs
