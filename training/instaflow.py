"""InstaFlow: a rectified flow distilled into one step.

Liu et al., arXiv 2309.06380. The flow is straightened first, because a straight flow couples noise and data so that one
step can follow it; distilled directly, a teacher's one step learns the average of what its curved ways lead to.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .condition import Condition
from .config import RoleConfig, TrainerConfig, require, role_configs
from .data import PromptData
from .economy import size_of
from .flow import NETWORKS, FlowMethod, ReflowConfig, flow_pairs, pair_of, rectify, stacked
from .image_distance import ImageDistance
from .memory_config import settled
from .method import Losses, Step
from .recipe import Setup, Stage
from .straight_path import StraightPath

SPACES = ("latent", "pixel")


@dataclass(frozen=True)
class InstaFlowConfig:
    """Everything that an InstaFlow depends on beside its teacher and its prompts.

    Attributes:
        trainer: of the distillation by squared error. Its seed, precision and memory are the whole run's; those of
            `reflow.trainer` are not used.
        student: of the one-step student's optimiser.
        reflow: of what comes before. Pairs, solver, guidance and parameterisation of the distillation are those of
            the flow that it leaves; `reflow.rectifications = 0` distils the teacher directly, which the paper shows
            failing for Stable Diffusion.
        network: "unet", or "stacked" for two of them in series (InstaFlow-1.7B).
        space: where the squared error is taken: "latent", or "pixel" through the VAE decoder.
        lpips_updates: of a last stage by LPIPS, in pixels; 0 leaves it out.
        lpips_backbone: of LPIPS: the path of VGG16's weights, or "vgg16" for torchvision's.
        lpips_heads: the path of its linear heads; None for a weight of 1 everywhere.
    """

    method: ClassVar[str] = "instaflow"

    trainer: TrainerConfig = TrainerConfig(updates=200, batch_size=64, ema_decay=0.98, checkpoint_every=50)
    student: RoleConfig = RoleConfig(1e-3, weight_decay=0.0, warm_up=20, decay=0.5)
    reflow: ReflowConfig = ReflowConfig()
    network: str = "unet"
    space: str = "latent"
    lpips_updates: int = 0
    lpips_backbone: str | None = None
    lpips_heads: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("network", NETWORKS), ("space", SPACES)):
            require(name, getattr(self, name), getattr(self, name) in known, f"one of {', '.join(known)}")
        require("lpips_updates", self.lpips_updates, self.lpips_updates >= 0, "0 or more")
        if self.lpips_updates > 0 and self.lpips_backbone is None:
            raise ValueError("lpips_updates above 0 needs lpips_backbone; got None")

    def stages(self, setup: Setup) -> Generator[Stage, nn.Module, None]:
        """Those of reflow, then the distillation by squared error, then the one by LPIPS."""
        lpips = self._lpips(setup)
        common = {"seed": self.trainer.seed, "memory": self.trainer.memory, "precision": self.trainer.precision}
        reflow = replace(self.reflow, trainer=replace(self.reflow.trainer, **common))
        flow = yield from rectify(reflow, setup, delivers=False)
        pairs = flow_pairs(flow, reflow, setup, reflow.rectifications + 1)
        data = PromptData(setup.conditions, setup.teacher.sample_shape, pairs)
        network = stacked(flow.network) if self.network == "stacked" else flow.network
        frozen = {"decoder": setup.teacher.pipeline.vae} if self.space == "pixel" else {}
        decode = setup.teacher.decode if self.space == "pixel" else None
        sliced = settled(self.trainer, size_of(network)).memory.decode != "plain"
        method = FlowDistillation(
            network, flow.path, decode=decode, frozen=frozen, by_sample=sliced, measured=flow.measured
        )
        network = yield Stage("distillation", method, data, self.trainer, role_configs(self), lpips is None)
        del method  # its student, of which the average goes on
        if lpips is not None:
            method = FlowDistillation(
                network,
                flow.path,
                distance=lpips,
                decode=setup.teacher.decode,
                frozen={"decoder": setup.teacher.pipeline.vae, "lpips": lpips},
                by_sample=sliced,
                measured=flow.measured,
            )
            trainer = replace(self.trainer, updates=self.lpips_updates)
            yield Stage("distillation-lpips", method, data, trainer, role_configs(self))

    def _lpips(self, setup: Setup) -> nn.Module | None:
        """Before anything is trained, so that a file that is not there is found now."""
        if self.lpips_updates == 0:
            return None
        from fastdistill.losses import LPIPS

        return LPIPS(self.lpips_backbone, self.lpips_heads, no_grad="y").to(setup.teacher.device)


class FlowDistillation(FlowMethod):
    """The student learns in one Euler step from pure noise, t = 0, what its flow does in many (arXiv 2309.06380).

    Each batch is a `pair_noise`, its `pair_sample` and its `pair_condition` (`fastdistill.training.Data`).

    Args:
        distance: of samples (B, …) and targets (B, …), or of images (B, 3, H, W) where there is a `decode`: a tensor
            whose mean is the loss. By default the squared error.
        decode: samples to images; None compares the samples.
        frozen: networks that `distance` and `decode` use, by name: they receive no gradient.
        by_sample: see `ImageDistance`.
        others: see `FlowMethod`.
    """

    name = "instaflow"

    def __init__(
        self,
        network: nn.Module,
        path: StraightPath,
        *,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        frozen: dict[str, nn.Module] | None = None,
        by_sample: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(network, path, **others)
        self.roles |= {} if frozen is None else frozen
        self.distance, self.decode = F.mse_loss if distance is None else distance, decode
        self.decodes_by_sample = by_sample

    def facts(self) -> dict[str, Any]:
        distance = "squared error" if self.distance is F.mse_loss else type(self.distance).__name__
        return super().facts() | {"distance": distance, "space": "latent" if self.decode is None else "pixel"}

    def generate(self, noise: Tensor, condition: Condition) -> Tensor:
        """The student's one step: noise (B, ...) and its condition to a sample of the data (B, ...)."""
        t = torch.zeros(len(noise), device=noise.device)
        return noise + self.path.velocity(self.student, noise, t, condition)

    def losses(self, role: str, step: Step) -> Losses:
        noise, target, condition = pair_of(step)
        sample = self.generate(noise, condition)
        if self.decode is None:
            loss = self.distance(sample, target).mean()
        else:
            loss = ImageDistance(self.decode, self.distance, by_sample=self.decodes_by_sample)(sample, target)
        return Losses({"distillation": loss}, self._logs())
