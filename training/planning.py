"""The memory of a run, planned before it: of an architecture alone, or of a teacher that is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from .data import Data
from .memory_plan import MemoryPlan
from .recipe import MethodConfig
from .teacher import Teacher


def plan_memory(
    config: MethodConfig,
    source: str | Path | Teacher,
    *,
    resolution: int | None = None,
    prompts: int = 1000,
    images: Data | None = None,
    pairs_given: bool = False,
    device: str | torch.device = "cuda",
    largest: int = 0,
) -> MemoryPlan:
    """What a run takes of one device, in bytes by role and turn; computed with neither memory nor a GPU.

    The method's own stages are made and the trainer's own turns taken on fake tensors, which have shapes and no values.
    Nothing that is given is changed, nor any random generator.

    Args:
        config: of a method.
        source: an architecture by name ("sd15", "sd21", "sdxl", …), a pipeline folder, whose weights are not read, or a
            loaded teacher.
        resolution: pixels of a side; None is what the UNet was made for. Of a loaded teacher it is always that.
        prompts: how many the run holds the conditions of on the device.
        images: real samples of the run; with a name or folder None stands for latents that were encoded before.
        pairs_given: whether the teacher's pairs are read from a disk, and not made by the run.
        device: that the run is for: a GPU, or "cpu", whose autocast keeps more in 16 bits.
        largest: how many of the largest tensors are named at the highest point of each turn.

    Raises:
        fastdistill.models.ModelError: an unknown name, or no pipeline folder.
        ValueError: settings that do not go together, a resolution that the architecture cannot have, or a
            `target_teacher`, which is not planned.
    """
    from .simulation import copy_of, fake_mode, planned_images, simulate, teacher_of
    from .simulation.data import PlannedImages, tensors_of

    if getattr(config, "target_teacher", ""):
        raise ValueError(f"target_teacher {config.target_teacher}: memory is planned for one teacher alone")
    kind, held = torch.device(device).type, []
    with torch.random.fork_rng(devices=[]):
        fake = fake_mode()
        if isinstance(source, Teacher):
            teacher, name = copy_of(source, fake), source.name
            if images is not None:
                held = tensors_of(images)
                images = planned_images(images, teacher, source.device)
        else:
            from fastdistill.models.architectures import resolve_architecture

            architecture = resolve_architecture(source)
            teacher, name = teacher_of(architecture, fake, resolution), architecture.name
            images = PlannedImages(teacher)
        return simulate(
            config,
            teacher,
            architecture=name,
            prompts=prompts,
            images=images,
            pairs_given=pairs_given,
            held=held,
            device=kind,
            largest=largest,
        )
