"""Networks that a method loads by name, LPIPS's and the discriminator's, without their weights."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..features import build_features, untrained_features
from ..unet_features import UNET_FEATURES
from .fakes import Weightless, fake_copy

_VGG_STAGES = (64, 128, 256, 512, 512)


def with_networks(config: Any, fake: FakeTensorMode) -> tuple[Any, list[nn.Module]]:
    """A method's configuration with networks in place of the names that it would load them by, and these networks."""
    made: list[nn.Module] = []
    changes: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "lpips_backbone" and value is not None:
            from fastdistill.losses._vgg16 import VGG16Features

            with Weightless(fake):
                changes[field.name] = VGG16Features()
            made.append(changes[field.name])
        elif field.name == "lpips_heads" and value is not None:
            changes[field.name] = [torch.ones(width) for width in _VGG_STAGES]
        elif field.name == "features" and value != UNET_FEATURES and getattr(config, "adversarial_weight", 0) > 0:
            with torch.device("meta"):
                features = untrained_features(value)
            changes[field.name] = build_features(fake_copy(fake, features))
        elif is_dataclass(value):
            changes[field.name], inner = with_networks(value, fake)
            made += inner
    return replace(config, **changes), made
