"""Rectified flow: reflow makes a flow straighter, by learning the velocity from noises to where a flow carries them.

Liu et al., "Flow Straight and Fast", arXiv 2209.03003; InstaFlow, 2309.06380. A diffusion teacher is the first flow
(1-RF); reflow on its pairs gives the 2-rectified flow, reflow on those of that the 3-rectified. Each ends near where
its predecessor does, on straighter ways, so fewer Euler steps do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdistill import diffusion
from fastdistill.losses import flow_interpolate, flow_matching_loss

from .adapters import AdapterRole
from .condition import Condition
from .config import RoleConfig, TrainerConfig, require, role_configs
from .data import PromptData
from .draws import Draws
from .method import Losses, Method, Step, Turn
from .pairs import Pairs, pairs_for, pairs_of
from .pipelines import one_step_scheduler
from .recipe import Setup, Stage
from .solvers import check_solver
from .straight_path import StraightPath, flow_straightness

PARAMETERIZATIONS = ("teacher", "flow")
NETWORKS = ("unet", "stacked")
TIMES = ("uniform", "logit_normal", "u_shaped")


@dataclass(frozen=True)
class ReflowConfig:
    """Everything that reflow depends on beside its teacher and its prompts.

    Attributes:
        trainer: of each reflow.
        student: of the optimiser of the network that becomes the next flow.
        rectifications: how often reflow is done: 1 gives the 2-rectified flow, 2 the 3-rectified. 0 is for
            `InstaFlowConfig` alone, where it leaves reflow out.
        parameterization: what the network of a rectified flow predicts. "teacher": what the teacher predicts, at the
            teacher's timesteps, so that it starts as the teacher's flow and every sampler of the teacher fits. "flow":
            the velocity noise - data itself, on the straight path, at the time 1000 * (1 - t), from the teacher's
            weights.
        network: "unet", or "stacked" for two of them in series (`fastdistill.models.stacked`).
        times: of the t that reflow learns at: "uniform"; "logit_normal" (arXiv 2403.03206), around the middle;
            "u_shaped", density cosh(4 * (2t - 1)), near the ends (after arXiv 2405.20320).
        prompt_dropout: share of the pairs that are learned with the empty prompt, for guiding the rectified flow.
        pairs: how many noises are carried along the flow, for each reflow.
        solver, pair_steps: how (`fastdistill.training.solvers`).
        guidance_scale: classifier-free, of the teacher whose flow is rectified; 1 for none. 5 in the paper.
        flow_guidance_scale: of the rectified flows, wherever one is sampled. 1.5 in the paper.
        steps: Euler steps that the delivered flow is sampled with.
        straightness_samples: noises that straightness is measured on, before and after; 0 to leave it out. One costs
            100 passes of the network, 200 with guidance.
    """

    method: ClassVar[str] = "reflow"

    trainer: TrainerConfig = TrainerConfig(updates=400, batch_size=64, ema_decay=0.98, checkpoint_every=50)
    student: RoleConfig = RoleConfig(1e-3, weight_decay=0.0, warm_up=20, decay=0.5)
    rectifications: int = 1
    parameterization: str = "teacher"
    network: str = "unet"
    times: str = "uniform"
    prompt_dropout: float = 0.1
    pairs: int = 2000
    solver: str = "euler"
    pair_steps: int = 25
    guidance_scale: float = 1.0
    flow_guidance_scale: float = 1.0
    steps: int = 4
    straightness_samples: int = 64

    def __post_init__(self) -> None:
        for name in ("pairs", "pair_steps", "steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("rectifications", "guidance_scale", "flow_guidance_scale", "straightness_samples"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        require("prompt_dropout", self.prompt_dropout, 0 <= self.prompt_dropout < 1, "in [0, 1)")
        for name, known in (("parameterization", PARAMETERIZATIONS), ("network", NETWORKS), ("times", TIMES)):
            require(name, getattr(self, name), getattr(self, name) in known, f"one of {', '.join(known)}")
        check_solver(self.solver)

    def stages(self, setup: Setup) -> Generator[Stage, nn.Module, None]:
        """One per rectification."""
        require("rectifications", self.rectifications, self.rectifications >= 1, "1 or more for the method reflow")
        yield from rectify(self, setup, delivers=True)


@dataclass(frozen=True)
class Flow:
    """A network that is a flow, and how it is sampled.

    Attributes:
        network: its weights are shared, not copied.
        path: how it is asked for its velocity.
        guidance_scale, unconditional: of every sample and measurement.
        measured: the straightness of every flow up to this one by its name ("1-RF" is the teacher's), each at its
            guidance; flows that stem from one share it.
    """

    network: nn.Module
    path: StraightPath
    guidance_scale: float = 1.0
    unconditional: Condition | None = None
    measured: dict[str, float] = field(default_factory=dict)


def rectify(config: ReflowConfig, setup: Setup, *, delivers: bool) -> Generator[Stage, nn.Module, Flow]:
    """Stages of reflow, each sent its trained network; returns the last rectified flow, or with none the teacher's.

    delivers: whether the last one is what the run is for.
    """
    teacher = setup.teacher
    guided = config.prompt_dropout > 0 or config.flow_guidance_scale != 1 or config.guidance_scale != 1
    unconditional = teacher.unconditional if guided else None
    path = StraightPath(teacher.schedule, teacher.prediction_type)
    flow = Flow(teacher.unet, path, config.guidance_scale, unconditional)
    _measure(flow, config, setup)
    if config.parameterization == "flow":
        path = flow_path(teacher.device)
    for number in range(1, config.rectifications + 1):
        method = Reflow(
            stacked(flow.network) if config.network == "stacked" else flow.network,
            path,
            times=config.times,
            prompt_dropout=config.prompt_dropout,
            unconditional=unconditional,
            steps=config.steps,
            guidance_scale=config.flow_guidance_scale,
            measured=flow.measured,
        )
        data = PromptData(setup.conditions, teacher.sample_shape, flow_pairs(flow, config, setup, number))
        is_last = delivers and number == config.rectifications
        network = yield Stage(f"reflow-{number}", method, data, config.trainer, role_configs(config), is_last)
        del method  # its student, of which the average goes on
        flow = Flow(network, path, config.flow_guidance_scale, unconditional, flow.measured)
        _measure(flow, config, setup)
    return flow


def flow_pairs(flow: Flow, config: ReflowConfig, setup: Setup, number: int) -> Pairs:
    """Noises and where the flow carries them; of the teacher those that the user gave, if any.

    number: of the set within the run. Each has noises of its own.
    """
    options = {
        "count": config.pairs,
        "solver": config.solver,
        "steps": config.pair_steps,
        "guidance_scale": flow.guidance_scale,
        "seed": 1000 * config.trainer.seed + number,  # the loop's own noises are drawn from its seed
    }
    if flow.network is setup.teacher.unet:
        return pairs_for(setup, **options)
    schedule, prediction_type = flow.path.schedule, flow.path.prediction_type
    return pairs_of(setup, flow.network, schedule, prediction_type, unconditional=flow.unconditional, **options)


def flow_path(device: torch.device | str | None = None) -> StraightPath:
    """Of networks that predict noise - data at the time 1000 * (1 - t).

    It goes as far towards noise as diffusers' samplers do: their first sigma is 0.999, where unit noise is read.
    """
    schedule = diffusion.flow(1000)
    inner = {name: getattr(schedule, name)[:-1] for name in vars(schedule)}
    return StraightPath(diffusion.Schedule(**inner).to(device), "flow_prediction")


def stacked(network: nn.Module) -> nn.Module:
    """Two UNets in series from one; a stack as it is."""
    from fastdistill.models.stacked import StackedUNet

    if isinstance(network, AdapterRole):
        raise ValueError('network "stacked" needs networks of its own: memory.roles "full"; got adapters')
    return network if isinstance(network, StackedUNet) else StackedUNet.from_unet(network)


class FlowMethod(Method):
    """What reflow and its distillation share: a student that is a flow, its sampling and its scheduler.

    Args:
        network: the student starts as a copy of it.
        path: how the student is asked for its velocity.
        steps, guidance_scale: how the delivered student is sampled.
        measured: straightness of the flows before, by name; shown in the log and kept beside the student.
    """

    def __init__(
        self,
        network: nn.Module,
        path: StraightPath,
        *,
        steps: int = 1,
        guidance_scale: float = 1.0,
        measured: dict[str, float] | None = None,
    ) -> None:
        if steps > 1 and path.prediction_type == "epsilon" and bool(path.schedule.alpha[-1] == 0):
            raise ValueError(
                f"steps={steps}: diffusers samples no epsilon network from pure noise in more than one step; "
                'needed steps=1, or parameterization="flow"'
            )
        self.student = copy.deepcopy(network).train().requires_grad_(True)
        self.roles = {"student": self.student}
        self.turns = (Turn("student"),)
        self.path, self.start = path, path.start
        self.steps, self.guidance_scale = steps, guidance_scale
        self.measured = {} if measured is None else measured

    def facts(self) -> dict[str, Any]:
        return {"prediction_type": self.path.prediction_type}

    def figures(self) -> dict[str, float]:
        return {f"straightness of {flow}": value for flow, value in self.measured.items()}

    def sampling(self) -> dict[str, Any]:
        return {"steps": self.steps, "timestep": self.start, "guidance_scale": self.guidance_scale}

    def scheduler(self, teacher_scheduler: Any) -> Any:
        return flow_scheduler() if self.path.is_flow else one_step_scheduler(teacher_scheduler, self.start)

    def _logs(self) -> dict[str, Tensor]:
        """The straightness of the flow that made the pairs, the newest one that was measured."""
        newest = list(self.measured.values())[-1:]
        return {"straightness": torch.tensor(newest[0])} if newest else {}


class Reflow(FlowMethod):
    """The student learns the velocity on the straight line between the two ends of a pair (2209.03003, eq. 1).

    Each batch is a `pair_noise`, its `pair_sample` and its `pair_condition` (`fastdistill.training.Data`).

    Args:
        times, prompt_dropout: see `ReflowConfig`.
        unconditional: of the empty prompt; needed for prompt dropout.
        others: see `FlowMethod`.
    """

    name = "reflow"

    def __init__(
        self,
        network: nn.Module,
        path: StraightPath,
        *,
        times: str = "uniform",
        prompt_dropout: float = 0.0,
        unconditional: Condition | None = None,
        **others: Any,
    ) -> None:
        super().__init__(network, path, **others)
        if prompt_dropout > 0 and unconditional is None:
            raise ValueError(f"prompt_dropout {prompt_dropout} needs the condition of the empty prompt")
        self.times, self.prompt_dropout, self.unconditional = times, prompt_dropout, unconditional

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"times": self.times, "prompt_dropout": self.prompt_dropout}

    def losses(self, role: str, step: Step) -> Losses:
        noise, data, condition = pair_of(step)
        t = sample_times(self.times, step.draws)
        if self.prompt_dropout > 0:
            condition = condition.where(step.draws.rand() >= self.prompt_dropout, self.unconditional)
        velocity = self.path.velocity(self.student, flow_interpolate(data, noise, t), t, condition)
        return Losses({"reflow": flow_matching_loss(velocity, data, noise)}, self._logs())


def pair_of(step: Step) -> tuple[Tensor, Tensor, Condition]:
    """Noise, data and condition of a batch's pairs."""
    if "pair_noise" not in step.batch:
        raise ValueError("a flow learns from pairs; the data has none")
    return step.batch["pair_noise"], step.batch["pair_sample"], step.batch["pair_condition"]


def sample_times(distribution: str, draws: Draws) -> Tensor:
    """(B,) t of a distribution of `TIMES`, at most 0.999, the last of 1000 steps: data has no velocity of its own."""
    if distribution == "logit_normal":
        t = torch.sigmoid(draws.randn())
    elif distribution == "u_shaped":
        t = 0.5 + torch.asinh((2 * draws.rand() - 1) * math.sinh(4.0)) / 8
    else:
        t = draws.rand()
    return t.clamp(max=0.999)


def flow_scheduler() -> Any:
    """A diffusers scheduler that samples a network of noise - data in Euler steps within ordinary pipelines.

    `FlowMatchEulerDiscreteScheduler` has not the methods that Stable Diffusion's pipelines call. DPM-Solver++ of first
    order is Euler's method on the straight path.
    """
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        solver_order=1,
        steps_offset=1,  # what pipelines ask of every scheduler; of no meaning here
        final_sigmas_type="zero",
    )


def _measure(flow: Flow, config: ReflowConfig, setup: Setup) -> None:
    if config.straightness_samples > 0:
        flow.measured[f"{len(flow.measured) + 1}-RF"] = flow_straightness(
            flow.network,
            flow.path,
            setup.conditions,
            setup.teacher.sample_shape,
            samples=config.straightness_samples,
            batch_size=config.trainer.batch_size,
            guidance_scale=flow.guidance_scale,
            unconditional=flow.unconditional,
            seed=config.trainer.seed,
        )
