"""One call from a teacher's pipeline and a list of prompts to a one-step pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastdistill import __version__

from .adapters import plain
from .card import package_commit, student_card
from .data import Data, networks_of
from .dmd import DMDConfig
from .economy import restore
from .pipelines import save_pipeline, student_pipeline, weights_digest
from .recipe import MethodConfig, Setup, Stage, settings_of
from .settings import to_dict
from .teacher import Teacher
from .trainer import Run, Trainer, TrainingProgress
from .world import World

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Callback = Callable[[TrainingProgress], bool | None]
Validate = Callable[..., Mapping[str, float]]


@dataclass(frozen=True)
class Distilled:
    """A student and where it comes from.

    Attributes:
        pipeline: ready to call with `num_inference_steps=1, guidance_scale=1.0`; float32, on the teacher's device.
        run: updates per role, seconds, last losses.
        facts: what `save` writes beside the weights: method, teacher, configuration, and how to sample.
        teacher_folder: where the teacher was loaded from, or None if it was given as a pipeline.
    """

    pipeline: DiffusionPipeline
    run: Run
    facts: dict
    teacher_folder: Path | None

    def save(self, folder: str | Path, card: str | None = None, dtype: torch.dtype = torch.float16) -> Path:
        """Write an ordinary diffusers pipeline folder with `fastdistill.json` and a model card beside it.

        Args:
            folder: a pipeline folder that is there is replaced; anything else that is not empty raises FileExistsError.
            card: Markdown for its `README.md`; None writes one from the facts.
            dtype: of the student's weights on disk.

        Raises:
            FileExistsError, PermissionError: `folder` cannot be written.
            ValueError: weights too large for `dtype`, named.
        """
        folder = Path(folder)
        if card is None:
            card = student_card(folder.absolute().name, self.facts, teacher_folder=self.teacher_folder)
        save_pipeline(self.pipeline, folder, self.facts, card=card, dtype=dtype, frozen_parts=self.teacher_folder)
        return folder


def distill(
    teacher: str | Path | DiffusionPipeline | Teacher,
    prompts: Sequence[str],
    config: MethodConfig | None = None,
    *,
    images: Data | None = None,
    pairs: str | Path | None = None,
    callback: Callback | None = None,
    device: str | torch.device | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    validate: Validate | None = None,
    world: World | None = None,
) -> Distilled:
    """Distil a text-to-image teacher into one step, by the method whose configuration is given.

    Args:
        teacher: a bundled name ("digits-teacher"), a pipeline folder, or a loaded diffusers pipeline, which is
            frozen and cast to float32 (its UNet in channels_last memory) and otherwise left as it is.
        prompts: what the student shall be able to draw; one is drawn uniformly per sample.
        config: of a method: `DMDConfig` (the default), …
        images: real samples with captions, for the methods that train on them.
        pairs: a folder of pairs made before, for the methods that train on them; without it they make their own.
        callback: called with a `TrainingProgress` every `config.trainer.report_every` student updates; returning True
            ends the run early with what is there.
        device: to train on; None leaves the pipeline where it is (the CPU for a name or a folder).
        checkpoints: folder, in which every stage has one of its own, for a checkpoint every
            `config.trainer.checkpoint_every` updates and at the end, which SIGTERM and SIGINT bring about early; None
            for none.
        resume: continue from the newest checkpoint there; a resumed run equals an uninterrupted one bit for bit.
        validate: of the last stage, as in `Trainer`, called with the student and `method=`, which knows how it is
            sampled; such as a `fastdistill.training.validation.Validator`.
        world: as in `Trainer`.

    Example:
        >>> config = DMDConfig(trainer=TrainerConfig(updates=100))
        >>> result = distill("digits-teacher", ["a handwritten seven"], config)
        >>> image = result.pipeline("a handwritten seven", num_inference_steps=1, guidance_scale=1.0).images[0]

    Raises:
        TeacherError: the pipeline is of a kind that this loop cannot distil.
        fastdistill.models.ModelError: an unknown name or an unreadable folder.
        ValueError: no prompts, or a bad configuration; `resume` without `checkpoints`, or without one in it;
            `checkpoints` that hold a run, without `resume`; a method that trains on images without any.
        CheckpointError: a checkpoint cannot be written, or is of another run.
        BlockingIOError: another process trains in `checkpoints`.
        GradientContractError, FloatingPointError: see `fastdistill.training.Trainer.run`.
    """
    config = config or DMDConfig()
    prompts = tuple(prompts)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts must be a non-empty list of strings; got {prompts[:3]!r}")
    if resume and checkpoints is None:
        raise ValueError("resume needs checkpoints, the folder of the run to continue; got None")
    checkpoints = None if checkpoints is None else Path(checkpoints)
    check_checkpoints(checkpoints, resume)
    teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher, device)
    setup = Setup(
        teacher, prompts, teacher.encode(prompts), images, None if pairs is None else Path(pairs), work=checkpoints
    )
    of_teacher = teacher.facts()  # of its weights as they are now: a run may round or shard them
    with teacher.shared(config.trainer.memory.rank):
        stage, run = _run_stages(
            config, setup, of_teacher["unet_sha256"], callback, checkpoints, resume, validate, world
        )
        run = replace(run, student=plain(run.student))
    scheduler = stage.method.scheduler(teacher.pipeline.scheduler)
    facts = {
        "method": config.method,
        "fastdistill": __version__,
        "commit": package_commit(),
        "network": type(run.student).__name__,
        "scheduler": type(scheduler).__name__,
        "sampling": stage.method.sampling(),
        "prediction_type": stage.method.facts().get("prediction_type", teacher.prediction_type),
        "zero_terminal_snr": bool(teacher.schedule.alpha[-1] == 0),
        "teacher": of_teacher,
        "prompts": len(prompts),
        "updates": run.updates,
        "training": {"seconds": round(run.seconds, 1), "losses": run.losses, "validation": run.validation},
        "config": to_dict(config),
        **({"figures": figures} if (figures := stage.method.figures()) else {}),
    }
    return Distilled(student_pipeline(teacher.pipeline, run.student, scheduler), run, facts, teacher.folder)


def check_checkpoints(folder: Path | None, resume: bool) -> None:
    """Raise a ValueError for a run to continue that is not there, and for a new one where there is one."""
    there = folder is not None and any(folder.glob("*/step-*"))
    if resume and not there:
        raise ValueError(f"resume: there is no checkpoint in {folder}")
    if there and not resume:
        raise ValueError(f"checkpoints {folder}: holds a run; needed resume, which continues it, or another folder")


def _run_stages(
    config: MethodConfig,
    setup: Setup,
    before: str,
    callback: Callback | None,
    checkpoints: Path | None,
    resume: bool,
    validate: Validate | None,
    world: World | None,
) -> tuple[Stage, Run]:
    """The last stage that was run, and what became of it. A signal, or the callback, ends the run within a stage.

    before: digest of the weights that the first stage starts from, the teacher's.
    """
    stages = config.stages(setup)
    stage = next(stages)
    settings = settings_of(config) | {"prompts": sha256("\n".join(setup.prompts).encode()).hexdigest()}
    settings["teacher"] = before
    while True:
        folder = None if checkpoints is None else checkpoints / stage.name
        settings["weights before"] = before
        trainer = Trainer(
            stage.method,
            stage.data,
            stage.trainer,
            stage.roles,
            folder=folder,
            validate=partial(validate, method=stage.method) if validate is not None and stage.is_last else None,
            stage=stage.name,
            settings=settings,
            world=world,
        )
        if resume:
            trainer.resume()
        if trainer.config.memory.idle == "cpu":
            setup.teacher.park([*stage.method.roles.values(), *networks_of(stage.data)])
        try:
            run = trainer.run(callback)
        finally:
            restore(stage.method)
            setup.teacher.unpark()
        if run.ended != "finished":
            return stage, run
        # What prepared for the next stage shall not take memory beside it.
        last = stage if stage.is_last else None
        del trainer, stage
        before = "" if checkpoints is None else weights_digest(run.student)
        try:
            stage = stages.send(run.student)
        except StopIteration:
            return last, run
