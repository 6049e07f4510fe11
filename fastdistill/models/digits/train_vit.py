"""The feature network of the digits: a small vision transformer, trained to tell the digits apart."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..loading import quiet_libraries
from .data import Digits, load_digits
from .folder import check_target, written_whole
from .networks import IMAGE_SIZE, build_vit
from .train_vae import warm_up_and_cosine

BATCH = 32
LEARNING_RATE = 2e-3
LABEL_SMOOTHING = 0.1
HELD_OUT = 252  # the last ones, which two writers wrote: the order of the labels shows where a writer ends


def train_vit(steps: int = 800, seed: int = 0, log: Callable[[str], None] = print):
    """A `ViTForImageClassification` of the digits, in evaluation mode.

    Cross-entropy on the labels of all but the last `HELD_OUT` digits, moved, turned, scaled and partly covered at
    random: what a discriminator's augmentation does to them, its features shall bear.

    Args:
        steps: optimiser steps of 32 images.
        seed: of the weights, the batches and the augmentation.
        log: receives a line now and then.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = shown_digits()
    vit = build_vit().train()
    decayed = [p for p in vit.parameters() if p.ndim > 1]
    others = [p for p in vit.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * warm_up_and_cosine(step, steps)
        chosen = torch.randint(0, len(images), (BATCH,), generator=generator)
        x = augment(images[chosen], generator).expand(-1, 3, -1, -1)
        loss = F.cross_entropy(vit(x).logits, labels[chosen], label_smoothing=LABEL_SMOOTHING)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == steps - 1:
            log(f"vit step {step} loss {float(loss.detach()):.4f}")
    vit.eval().requires_grad_(False)
    return vit


def shown_digits() -> Digits:
    """What the network is trained on."""
    images, labels = load_digits()
    return Digits(images[:-HELD_OUT], labels[:-HELD_OUT])


@torch.no_grad()
def held_out_accuracy(vit) -> float:
    """Share of the digits it was not shown that `vit` recognises."""
    images, labels = load_digits()
    found = vit(images[-HELD_OUT:].expand(-1, 3, -1, -1)).logits.argmax(dim=1)
    return float((found == labels[-HELD_OUT:]).float().mean())


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, C, S, S) turned by up to 10 degrees, scaled by up to 10 %, moved by up to an eighth of a side.

    In half of them a square, a quarter to a half of a side long, is covered with paper.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator).to(device) * (high - low) + low

    angle, scale = uniform(-math.pi / 18, math.pi / 18), uniform(0.9, 1.1)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = (cosine, -sine, uniform(-0.25, 0.25), sine, cosine, uniform(-0.25, 0.25))  # a side is 2 long
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1  # outside is paper, -1

    half = uniform(0.125, 0.25) * (uniform(0, 1) < 0.5)
    places = (torch.arange(images.shape[-1], device=device) + 0.5) / images.shape[-1]
    inside = [(places - uniform(0, 1)[:, None]).abs() < half[:, None] for _ in range(2)]
    covered = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(covered, -1.0, moved)


def save_vit(vit, folder: str | Path, card: str) -> Path:
    """Write `vit` as a folder of transformers: float16 safetensors, configurations, and the card as `README.md`.

    Raises:
        FileExistsError: see `check_vit_target`.
    """
    folder = check_vit_target(folder)
    with written_whole(folder) as fresh:
        with quiet_libraries():
            copy.deepcopy(vit).to(torch.float16).save_pretrained(fresh, safe_serialization=True)
        _open_in_float32(fresh / "config.json")
        (fresh / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")
        (fresh / "README.md").write_text(card, encoding="utf-8")
    return folder


def check_vit_target(folder: str | Path) -> Path:
    """The folder, if `save_vit` may write it: absent, empty, or such a network's."""
    return check_target(folder, mark="preprocessor_config.json", what="vision transformer")


# In the form that every version of transformers reads; pixels 0..255 become -1..1.
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def _open_in_float32(config_file: Path) -> None:
    """transformers 5 opens weights in the dtype that the configuration names, and would compute in float16."""
    config = json.loads(config_file.read_text())
    for name in ("dtype", "_name_or_path"):
        config.pop(name, None)
    config["torch_dtype"] = "float32"  # the name that versions 4 and 5 know
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
