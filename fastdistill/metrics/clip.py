"""CLIP score: how well images fit their prompts, to a CLIP model that the user gives.

Hessel et al., arXiv 2104.08718.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._images import Images, as_pictures


def clip_score(
    images: Images, prompts: Sequence[str], model, processor, *, weight: float = 1.0, batch_size: int = 32
) -> float:
    """Mean over the images of `weight * max(cosine(image, prompt), 0)`.

    Three scales are in use, of one figure: `weight=1` is the plain cosine that text-to-image papers report (about 0.3
    for Stable Diffusion), `weight=100` that of torchmetrics, `weight=2.5` the paper's CLIP-S, which also puts
    "A photo depicts " in front of every prompt (do that in `prompts`). Scores of different CLIP models are not
    comparable: name the model beside the figure.

    Args:
        images, prompts, model, processor, batch_size: as for `clip_similarities`.
        weight: factor of the scale that is wanted.
    """
    similarities = clip_similarities(images, prompts, model, processor, batch_size=batch_size)
    return float(weight * similarities.clamp(min=0).mean())


@torch.no_grad()
def clip_similarities(images: Images, prompts: Sequence[str], model, processor, *, batch_size: int = 32) -> Tensor:
    """Cosine between each image and its prompt, (N,) float64 on the CPU, in [-1, 1].

    Args:
        images: tensor (N, 1 or 3, H, W) or array (N, H, W, 1 or 3), uint8 or floating in [0, 1], or PIL images.
        prompts: N texts; what exceeds the model's context (77 tokens) is cut off.
        model: `transformers.CLIPModel`, in eval mode, on any device.
        processor: its `transformers.CLIPProcessor`: tokens, and images resized, cropped and normalised.
        batch_size: images at a time.

    Raises:
        TypeError, ValueError: images of another form, another number of prompts, `batch_size` below 1.
    """
    pictures = as_pictures(images)
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("prompts: needed a sequence of texts, one per image")
    if len(prompts) != len(pictures):
        raise ValueError(f"prompts: {len(prompts)} for {len(pictures)} images; needed one per image")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: needed 1 or more")
    cosines = []
    for start in range(0, len(pictures), batch_size):
        part = slice(start, start + batch_size)
        inputs = processor(
            text=list(prompts[part]), images=pictures[part], return_tensors="pt", padding=True, truncation=True
        )
        embeddings = model(**{name: value.to(model.device) for name, value in inputs.items()})
        image, text = embeddings.image_embeds.double().cpu(), embeddings.text_embeds.double().cpu()
        cosines.append(torch.cosine_similarity(image, text))
    return torch.cat(cosines)
