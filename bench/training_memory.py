"""An update of DMD with LPIPS through the VAE decoder: the plain loop against this one, with what saves memory.

Full-rank roles on both sides, the same losses and numbers. The plain loop is what one writes first: float32 AdamW and
weights, nothing computed again, one backward pass per turn.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from fastdistill.training import DMDConfig, Draws, PromptData, RoleConfig, Setup, Stage, Teacher, TrainerConfig
from fastdistill.training.memory_config import MemoryConfig
from fastdistill.training.method import Losses, Step, Turn
from fastdistill.training.pairs import Pairs
from fastdistill.training.simulation import fake_mode, simulate, teacher_of
from fastdistill.training.simulation.rehearsal import Rehearsal
from fastdistill.training.simulation.teacher import PlannedTeacher
from torch import Tensor, nn

from fastdistill.losses._vgg16 import VGG16Features
from fastdistill.models.architectures import Architecture, find_architecture
from fastdistill.models.builders import random_pipeline

from . import accuracy, usage
from .gpu import Gpu
from .plain_training import Clock, PlainUpdate, TrainerUpdate, reference_ops
from .rows import Key, Row
from .runner import Job
from .timing import PairTimes, Speed, time_pairs
from .training import InDtype, nudge
from .usage import Usage

NAME = "training"
BASELINE = "torch"
LOSSES = ("dmd", "regression", "fake_score")
PLANNED = "sd15"
BATCH, GPU_BATCH, GPU_UPDATES = 4, 8, 5
PROMPTS = ("a photograph of a lighthouse", "an oil painting of a fox")

_NOTHING = {"optimizer": "float32", "checkpointing": "none", "frozen": "float32", "decode": "plain", "idle": "device"}
PLAIN = MemoryConfig(**_NOTHING)
_SLICED = replace(PLAIN, decode="sliced")

OPTIONS: dict[str, MemoryConfig] = {
    "no option": PLAIN,
    "8-bit moments": replace(PLAIN, optimizer="8bit"),
    "sliced decode": _SLICED,
    "sliced decode, 8-bit moments": replace(_SLICED, optimizer="8bit"),
    "sliced decode, recompute, 8-bit moments": replace(_SLICED, checkpointing="recompute", optimizer="8bit"),
    "sliced decode, blocks, 8-bit moments": replace(_SLICED, checkpointing="blocks", optimizer="8bit"),
}
"""What is compared with the plain loop, by the name that its row has."""


def small() -> Architecture:
    """Stable Diffusion 1.5 at a fifth of its widths and a quarter of its pictures' sides: an update takes seconds."""
    published = find_architecture("sd15")
    changes = {
        "unet": {"block_out_channels": (64, 128, 256, 256), "sample_size": 16},
        "vae": {"block_out_channels": (32, 64, 128, 128), "sample_size": 128},
    }
    networks = {
        name: replace(network, config={**network.config, **changes.get(name, {})})
        for name, network in published.networks.items()
    }
    return replace(published, name="sd15-small", networks=networks)


def config_of(memory: MemoryConfig, batch: int, precision: str) -> DMDConfig:
    """Of one update of each role per iteration, LPIPS included."""
    trainer = TrainerConfig(batch_size=batch, precision=precision, memory=memory)
    role = RoleConfig(1e-6, beta1=0.0)  # the networks stay where they are while they are timed
    return DMDConfig(
        trainer, student=role, fake_score=role, critic_ratio=1, regression="lpips", lpips_backbone=random_vgg16()
    )


def random_vgg16() -> nn.Module:
    """What it allocates and computes does not depend on its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VGG16Features()


def stage_of(teacher: Teacher, memory: MemoryConfig, batch: int, precision: str) -> Stage:
    """DMD's stage on noise in place of pairs: the teacher's weights are random, so its ODE would mean nothing."""
    config = config_of(memory, batch, precision)
    conditions = teacher.encode(PROMPTS)
    draws = Draws("pairs", batch_size=batch, device=teacher.device)
    noise, sample = draws.randn(*teacher.sample_shape), draws.randn(*teacher.sample_shape)
    pairs = Pairs(noise, sample, draws.randint(0, len(PROMPTS)))
    stage = next(replace(config, pairs=1, pair_steps=1).stages(Setup(teacher, PROMPTS, conditions)))
    # Two scores that are equal, as these are at first, give a gradient of nothing.
    nudge(stage.method.roles["fake_score"])
    return replace(stage, data=PromptData(conditions, teacher.sample_shape, pairs))


class PlainLoop(PlainUpdate):
    """With networks as diffusers loads them, and an LPIPS that keeps what its backward pass needs."""

    def __init__(self, stage: Stage, clock: Clock) -> None:
        super().__init__(stage, clock)
        for network in stage.method.roles.values():
            network.to(memory_format=torch.contiguous_format)
        stage.method.roles["lpips"].checkpoint = False


class PlainRehearsal(Rehearsal):
    """The plain loop on tensors without memory. It keeps no gradient of the other role, which a plain loop would."""

    def __init__(self, stage: Stage, teacher: PlannedTeacher, loaded: Iterable[nn.Module]) -> None:
        super().__init__(stage, teacher, loaded)
        stage.method.roles["lpips"].checkpoint = False

    def _parts(self, turn: Turn, step: Step) -> Iterator[Losses]:
        with reference_ops(), torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            yield self.method.losses(turn.kind, replace(step, draws=step.draws.fork(turn.kind))).whole()


def planned(memory: MemoryConfig, loop: type[Rehearsal] = Rehearsal) -> int:
    """Bytes of tensors of the full size on a GPU, at most: Stable Diffusion 1.5 at 512 pixels, bfloat16 passes."""
    architecture = find_architecture(PLANNED)
    teacher = teacher_of(architecture, fake_mode())
    config = config_of(memory, GPU_BATCH, "bfloat16")
    return simulate(config, teacher, architecture=PLANNED, prompts=len(PROMPTS), loop=loop).tensor_bytes


Update = Callable[[Stage, Clock], Callable[[], object]]


def jobs(device: str, pairs: int, gpu: Gpu | None = None) -> list[Job]:
    """A row per set of options: on a GPU of Stable Diffusion 1.5 (512 px, bfloat16 passes), else of a small one."""
    keys = {name: _key(name, device) for name in OPTIONS}
    return [Job(tuple(keys.values()), BASELINE, lambda: _rows(keys, device, pairs, gpu))] if keys else []


def _key(name: str, device: str) -> Key:
    case = f"sd15 x{GPU_BATCH} autocast" if device.startswith("cuda") else f"sd15-small x{BATCH}"
    return Key(NAME, case, f"dmd lpips update, {name}", "float32", "-", "-", device, "fastdistill")


def _rows(keys: dict[str, Key], device: str, pairs: int, gpu: Gpu | None) -> Iterator[Row]:
    def stage(memory: MemoryConfig) -> Stage:
        architecture = small() if gpu is None else find_architecture("sd15")
        teacher = Teacher(random_pipeline(architecture, device=device))
        return stage_of(teacher, memory, BATCH if gpu is None else GPU_BATCH, "float32" if gpu is None else "bfloat16")

    plain = partial(stage, PLAIN)
    plain_peak = _peak(PlainLoop, plain, gpu)
    plan_of_plain = planned(PLAIN, PlainRehearsal)
    timed = _in_turn(plain, pairs) if gpu is None else _one_by_one(plain, min(pairs, GPU_UPDATES), gpu)
    for name, key in keys.items():
        ours = partial(stage, OPTIONS[name])
        peak = _peak(TrainerUpdate, ours, gpu)
        plan = planned(OPTIONS[name])
        losses, times = timed(ours)
        note = (
            f"{key.case}, {name}: at most {_mib(peak)} of tensors, the plain loop {_mib(plain_peak)}: "
            f"{peak / plain_peak:.2f}x of the memory; "
            f"{PLANNED} x{GPU_BATCH} by the plan {_gib(plan)} of {_gib(plan_of_plain)}: {plan / plan_of_plain:.2f}x"
        )
        yield Row(key, BASELINE, Speed.of(times), losses, usage=Usage(peak), note=note)


def _peak(update: Update, stage: Callable[[], Stage], gpu: Gpu | None) -> int:
    """Bytes of tensors at most, networks and optimiser states included, up to the second update."""
    made = stage()
    if gpu is not None:
        torch.cuda.reset_peak_memory_stats(gpu.device)
        _twice(update, made)
        return torch.cuda.max_memory_allocated(gpu.device)
    networks = made.method.roles.values()
    before = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for n in networks for t in _tensors(n)}
    return sum(before.values()) + usage.on_cpu(lambda: _twice(update, made)).peak_bytes


def _twice(update: Update, stage: Stage) -> None:
    """The first one makes the optimisers' states."""
    run = update(stage, Clock())
    run()
    run()


Timed = Callable[[Callable[[], Stage]], tuple[accuracy.Accuracy, PairTimes]]
"""Of our stage: the error of its first update's losses, and the times of both sides."""


def _in_turn(plain: Callable[[], Stage], pairs: int) -> Timed:
    """Both sides alternate; errors are against the plain loop in float64."""
    exact = _losses(PlainLoop(_in_float64(plain()), Clock())())
    theirs = PlainLoop(plain(), Clock())
    baseline = _losses(theirs())

    def timed(ours: Callable[[], Stage]) -> tuple[accuracy.Accuracy, PairTimes]:
        mine = TrainerUpdate(ours(), Clock())
        error = accuracy.compare(_losses(mine()), baseline, exact, torch.float32)
        return error, time_pairs([mine], [theirs], pairs, clock=time.perf_counter_ns)

    return timed


def _one_by_one(plain: Callable[[], Stage], updates: int, gpu: Gpu) -> Timed:
    """Each side alone, as both do not fit beside each other; differences are from the plain loop in the same dtype."""
    baseline, their_times = _alone(PlainLoop, plain, updates, gpu)

    def timed(ours: Callable[[], Stage]) -> tuple[accuracy.Accuracy, PairTimes]:
        losses, times = _alone(TrainerUpdate, ours, updates, gpu)
        return accuracy.compare(losses, baseline, baseline, torch.bfloat16), PairTimes(times, their_times)

    return timed


def _alone(
    update: Update, stage: Callable[[], Stage], count: int, gpu: Gpu
) -> tuple[dict[str, Tensor], tuple[float, ...]]:
    run = update(stage(), Clock(gpu.synchronize))
    losses, taken = _losses(run()), []
    for _ in range(count):
        start = time.perf_counter_ns()
        run()
        gpu.synchronize()
        taken.append(float(time.perf_counter_ns() - start))
    del run
    gc.collect()
    torch.cuda.empty_cache()
    return losses, tuple(taken)


def _losses(found: dict) -> dict[str, Tensor]:
    """By name, of the Trainer's or of the plain loop's update, which has them by role."""
    by_role = {name: terms for name, terms in found.items() if isinstance(terms, dict)}
    if not by_role:
        return {name: found[name] for name in LOSSES}
    return {name: loss for terms in by_role.values() for name, loss in terms.items()}


def _in_float64(stage: Stage) -> Stage:
    for network in stage.method.roles.values():
        nn.Module.to(network, torch.float64)
    return replace(stage, data=InDtype(stage.data, torch.float64))


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
