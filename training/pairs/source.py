"""Whose ODE makes the pairs, and of which prompts."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdistill.diffusion import Schedule

from ..condition import Condition
from ..pipelines import weights_digest
from ..solvers import solve
from ..teacher import Teacher
from .pair_set import PairSet, prompts_facts, schedule_facts


@dataclass(frozen=True)
class Source:
    """A network with all that solving its ODE takes.

    Attributes:
        network: called as a diffusers UNet, in `dtype`.
        schedule, prediction_type: its own.
        prompts: the lines that pairs are made of.
        encode: from indices of lines (n,) int64 to their condition, on the network's device.
        unconditional: of the empty prompt, for guidance.
        sample_shape: of one latent.
        name, unet_sha256, text_sha256: to tell it from others.
        dtype: the conditions are cast to it.
    """

    network: nn.Module
    schedule: Schedule
    prediction_type: str
    prompts: tuple[str, ...]
    encode: Callable[[Tensor], Condition]
    unconditional: Condition
    sample_shape: tuple[int, ...]
    name: str
    unet_sha256: str
    text_sha256: str
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, teacher: Teacher, prompts: Sequence[str], dtype: torch.dtype = torch.float32) -> Source:
        """A teacher's; in another dtype than float32 its network is copied."""
        prompts = tuple(prompts)
        network = teacher.unet if dtype == torch.float32 else copy.deepcopy(teacher.unet).to(dtype)
        return cls(
            network,
            teacher.schedule,
            teacher.prediction_type,
            prompts,
            lambda lines: teacher.encode([prompts[line] for line in lines.tolist()]),
            teacher.unconditional,
            teacher.sample_shape,
            teacher.name,
            weights_digest(teacher.unet),
            text_digest(teacher),
            dtype,
        )

    @property
    def device(self) -> torch.device:
        return self.unconditional.states.device

    def pair_set(
        self,
        *,
        count: int,
        solver: str = "dpmpp",
        steps: int = 25,
        guidance_scale: float = 1.0,
        seed: int = 0,
        shard_size: int = 500,
        draws: str = "each",
        noise: str = "stored",
        text: bool = False,
    ) -> PairSet:
        """The description of a set of this source's pairs; see `PairSet`."""
        return PairSet(
            count=count,
            shard_size=shard_size,
            seed=seed,
            draws=draws,
            noise=noise,
            text=text,
            solver=solver,
            steps=steps,
            guidance_scale=float(guidance_scale),
            sample_shape=tuple(self.sample_shape),
            dtype=str(self.dtype).removeprefix("torch."),
            prediction_type=self.prediction_type,
            teacher=self.name,
            unet_sha256=self.unet_sha256,
            text_sha256=self.text_sha256,
            **schedule_facts(self.schedule),
            **prompts_facts(self.prompts),
        )

    def differences(self, pair_set: PairSet) -> list[str]:
        """Names of the facts about a teacher and its text that are others than those of a set; prompts are left out."""
        mine = {"unet_sha256": self.unet_sha256, "text_sha256": self.text_sha256}
        mine |= {"prediction_type": self.prediction_type, **schedule_facts(self.schedule)}
        return [name for name, value in mine.items() if getattr(pair_set, name) != value]

    def conditions(self, lines: Tensor) -> Condition:
        """Of lines (n,) int64, each distinct one encoded once, in the network's dtype."""
        distinct, places = lines.unique(return_inverse=True)
        return self.encode(distinct)[places.to(self.device)].to(self.dtype)

    def solve(self, pair_set: PairSet, noise: Tensor, condition: Condition) -> Tensor:
        """Where the ODE carries noise (B, ...), float32 on the network's device."""
        return solve(
            self.network,
            noise.to(self.device),
            condition,
            self.schedule,
            self.prediction_type,
            solver=pair_set.solver,
            steps=pair_set.steps,
            guidance_scale=pair_set.guidance_scale,
            unconditional=self.unconditional.to(self.dtype),
        )


def text_digest(teacher: Teacher) -> str:
    """Of the weights of a teacher's text encoders, to tell whose words the conditions are."""
    parts = (getattr(teacher.pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))
    digests = [weights_digest(part) for part in parts if part is not None]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
