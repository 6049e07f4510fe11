"""The convolutions of VGG16 and the five features that LPIPS takes from them.

Simonyan and Zisserman, arXiv 1409.1556, configuration D. Index and name of each layer are torchvision's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# Per stage: outputs of its convolutions. Each stage ends behind a ReLU: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

# torchvision's `features.0.weight`, the same of its `features` alone, and the public lpips package's slices of it.
_NAME = re.compile(r"(?:(?:net\.)?slice\d\.|features\.)?(\d+)\.(weight|bias)")


class VGG16Features(nn.Module):
    """Images (B, 3, H, W) to [relu1_2, relu2_2, relu3_3, relu4_3, relu5_3], with random weights; `stages` in order."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        self._convolutions: dict[int, nn.Conv2d] = {}  # by torchvision's index
        index, inputs = 0, 3
        for number, widths in enumerate(STAGES):
            layers: list[nn.Module] = []
            if number:
                layers.append(nn.MaxPool2d(2, 2))
                index += 1
            for outputs in widths:
                convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
                # In place: nobody else has what the convolution returns, and none of it is kept for its own backward.
                layers += [convolution, nn.ReLU(inplace=True)]
                self._convolutions[index] = convolution
                index, inputs = index + 2, outputs
            self.stages.append(nn.Sequential(*layers))

    def forward(self, images: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            images = stage(images)
            features.append(images)
        return features

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> VGG16Features:
        """Under torchvision's names, or those of the public lpips package; other keys are ignored."""
        found = {(int(m[1]), m[2]): value for name, value in state.items() if (m := _NAME.fullmatch(name))}
        network = cls()
        with torch.no_grad():
            for index, convolution in network._convolutions.items():
                for kind, parameter in convolution.named_parameters():
                    name = f"features.{index}.{kind}"
                    if (index, kind) not in found:
                        raise ValueError(f"backbone: the state dict of VGG16 lacks {name}")
                    if found[index, kind].shape != parameter.shape:
                        raise ValueError(
                            f"backbone: {name} of VGG16 is {tuple(parameter.shape)}, "
                            f"got {tuple(found[index, kind].shape)}"
                        )
                    parameter.copy_(found[index, kind])
        return network

    @classmethod
    def from_torchvision(cls) -> VGG16Features:
        """torchvision's weights, trained on ImageNet; downloaded by it when first asked for."""
        try:
            from torchvision.models import VGG16_Weights, vgg16
        except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
            raise ImportError(
                'backbone: "vgg16" needs torchvision (pip install torchvision), which cannot be imported here: '
                f"{error}. Without it: the path of a .safetensors file with VGG16's features.N.weight and .bias, or "
                "any module that returns a list of features"
            ) from error
        return cls.from_state_dict(vgg16(weights=VGG16_Weights.IMAGENET1K_V1).state_dict())
