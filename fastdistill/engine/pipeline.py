"""`OneStepPipeline`: from prompts to pictures in one to four calls of the UNet, and little else."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdistill.diffusion import guide
from fastdistill.engine import images
from fastdistill.engine.attention import DirectAttention
from fastdistill.engine.components import Components, take_apart
from fastdistill.engine.graph import GraphCache
from fastdistill.engine.norm import BoundGroupNormSiLU
from fastdistill.engine.passes import apply_passes, check_switches
from fastdistill.engine.passes.fold_timestep import fold
from fastdistill.engine.prompts import PromptEncoder
from fastdistill.engine.report import EngineReport
from fastdistill.engine.request import Request, check_device, check_dtype, check_request
from fastdistill.engine.sampling import ExplicitSteps, FoldedSteps, Plan, check_scheduler, make_plan
from fastdistill.engine.unet import time_embedding, unet_forward
from fastdistill.models import load_pipeline
from fastdistill.ops import Explanation, explain

_MOST_PLANS = 16


@dataclass(frozen=True, eq=False)
class _Program:
    """A plan bound to one engine: its arithmetic between UNet calls, and per step its time on the device.

    `times[i]` is the timestep () or, folded, one bias per residual block.
    """

    plan: Plan
    steps: FoldedSteps | ExplicitSteps
    times: tuple[Tensor | tuple[Tensor, ...], ...]


class OneStepPipeline:
    """Samples a distilled (or any) Stable Diffusion pipeline with as little as possible around its networks.

        pipe = OneStepPipeline.from_pretrained("digits-dmd")
        image = pipe("a handwritten seven", seed=0)[0]
        print(pipe.explain())

    The same call gives the same bytes, whatever was called before and from whichever thread; within another batch an
    image differs by rounding, at most 1/255. Calls from several threads are safe: what they share (plans, cached
    prompts, CUDA graphs) is behind locks; on a CPU the networks run at the same time.
    """

    def __init__(
        self,
        pipeline,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        passes: Iterable[str] | Mapping[str, bool] | None = None,
        name: str = "pipeline",
    ) -> None:
        """An engine for a diffusers `StableDiffusionPipeline`, which stays as it is: its networks are copied.

        Args: as `from_pretrained`, and
            name: what `explain()` calls the model.

        Raises: as `from_pretrained`.
        """
        device, dtype, switches = check_device(device), check_dtype(dtype), check_switches(passes)
        self._build(take_apart(pipeline, own=False), device, dtype, switches, name)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        passes: Iterable[str] | Mapping[str, bool] | None = None,
    ) -> OneStepPipeline:
        """Load a bundled model or a diffusers folder and rewrite it for speed.

        Args:
            path_or_name: "digits-teacher", "digits-dmd", or a StableDiffusionPipeline folder whose scheduler is DDIM,
                EulerDiscrete or LCM.
            device: "cpu", "cuda" or "cuda:N"; None takes a GPU when there is one.
            dtype: of all weights and of the networks' arithmetic: torch.float32, float16, bfloat16 or float64.
                Latents are float32 between steps (float64 for float64).
            passes: None for all of `fastdistill.engine.PASSES`; names for only these; `{"name": False}` for all but it.

        Raises:
            ModelError: unknown or broken (see `fastdistill.models.resolve_model`), or nothing that this engine runs.
            ValueError: unknown device, dtype or pass.
        """
        device, dtype, switches = check_device(device), check_dtype(dtype), check_switches(passes)
        self = cls.__new__(cls)
        parts = take_apart(load_pipeline(path_or_name, dtype=dtype), own=True)
        self._build(parts, device, dtype, switches, str(path_or_name))
        return self

    def _build(
        self, parts: Components, device: torch.device, dtype: torch.dtype, switches: Mapping[str, bool], name: str
    ) -> None:
        check_scheduler(parts.scheduler)
        self.device, self.dtype, self.name = device, dtype, name
        self._parts = parts.to(device, dtype)
        self._reports = apply_passes(parts, switches)
        self._prompts = PromptEncoder(parts.tokenizer, parts.text_encoder, parts.prompt_cache)
        self._latent_dtype = torch.promote_types(dtype, torch.float32)
        self._graphs = GraphCache(device) if device.type == "cuda" else None
        self._programs: OrderedDict[int, _Program] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        steps: int = 1,
        guidance_scale: float = 0.0,
        output: str = "pil",
        size: int | tuple[int, int] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
    ) -> list[Image.Image] | np.ndarray | Tensor:
        """One image per prompt.

        Args:
            prompts: a prompt or a list of B prompts, none of them blank or longer than the text encoder reads.
            seed: image i starts from noise of its own CPU generator, seeded `seed + i`; or a list, one seed each.
            steps: calls of the UNet (twice the batch each under guidance), at the model's own scheduler's timesteps.
            guidance_scale: w of `uncond + w * (cond - uncond)`; 1 or less is off.
            output: "pil"; "np" for a float32 array (B, H, W, 3) in [0, 1]; "pt" for a float32 tensor (B, 3, H, W) in
                [0, 1] on the pipeline's device. In float64 pipelines these are float64.
            size: (height, width) or one number for both, in pixels; None is what the UNet was made for.
            negative_prompt: what guidance leads away from, one for all or one each; None is the empty prompt.

        Returns:
            A list of PIL images, an array or a tensor, as `output` says.

        Raises:
            ValueError: naming the argument, what was given and what is needed, before anything is computed.
        """
        parts = self._parts
        request = check_request(
            prompts,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            output=output,
            size=size,
            negative_prompt=negative_prompt,
            default_size=(parts.sample_size[0] * parts.image_scale, parts.sample_size[1] * parts.image_scale),
            size_multiple=parts.image_scale,
        )
        tokens = self._prompts.tokenize("prompts", request.prompts)
        if request.negative_prompts is not None:
            tokens |= self._prompts.tokenize("negative_prompt", request.negative_prompts)
        with torch.inference_mode():
            program = self._program(request.steps)
            context = self._context((*(request.negative_prompts or ()), *request.prompts), tokens)
            result = self._run(request, program, self._noise(request, program.plan), context)
        if output == "pil":
            return images.to_pil(result)
        if output == "np":
            return images.to_numpy(result)
        # A copy made outside of inference mode is an ordinary tensor, which autograd accepts.
        return result.clone(memory_format=torch.contiguous_format)

    def warmup(
        self,
        shapes: Iterable[tuple[int, int, int]] | None = None,
        *,
        steps: int = 1,
        guidance_scale: float = 0.0,
        output: str = "pil",
    ) -> None:
        """Do now what the first call of a shape would do: choose backends, fold timesteps, record CUDA graphs.

        Args:
            shapes: (batch, height, width) in pixels; None is one image of the default size.
            steps, guidance_scale, output: of the calls to come.

        Raises:
            ValueError: as the calls would.
        """
        for shape in [None] if shapes is None else shapes:
            if shape is not None and (not isinstance(shape, (tuple, list)) or len(shape) != 3 or not shape[0] >= 1):
                raise ValueError(f"shapes must be (batch, height, width) with at least one image each; got {shape!r}")
            batch, size = (1, None) if shape is None else (shape[0], tuple(shape[1:]))
            self(["warm-up"] * batch, steps=steps, guidance_scale=guidance_scale, output=output, size=size)

    def explain(self) -> EngineReport:
        """What every pass did and could not do, which backends serve norms and attention, and whether graphs are used.

        Attention is chosen by its sizes: what is told of it is what the calls so far (`warmup`) have asked for.
        """
        scheduler = self._parts.scheduler
        return EngineReport(
            model=self.name,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            scheduler=f"{type(scheduler).__name__} ({scheduler.config.prediction_type})",
            passes=self._reports,
            norms=self._explain_norms(),
            attention=self._explain_attention(),
            graphs=self._explain_graphs(),
            notes=self._parts.notes,
        )

    def forget_prompts(self) -> None:
        """Empty the caches of prompts: the next call encodes its prompts, and projects them, again."""
        self._prompts.clear()
        if self._parts.context is not None:
            self._parts.context.clear()

    def _program(self, steps: int) -> _Program:
        """The program of this many steps, made on first use; the last few are kept."""
        with self._lock:
            if steps not in self._programs:
                self._programs[steps] = self._make_program(steps)
                if len(self._programs) > _MOST_PLANS:
                    self._programs.popitem(last=False)
            self._programs.move_to_end(steps)
            return self._programs[steps]

    def _make_program(self, steps: int) -> _Program:
        parts = self._parts
        plan = make_plan(parts.scheduler, steps)
        kind = FoldedSteps if parts.fold_scales else ExplicitSteps
        times = [step.timestep.to(self.device) for step in plan.steps]
        if parts.folded_blocks is not None:
            times = [fold(parts.unet, parts.folded_blocks, time) for time in times]
        return _Program(plan, kind(plan, 1 / parts.scaling_factor), tuple(times))

    def _context(self, prompts: Sequence[str], tokens: Mapping[str, Any]) -> Tensor:
        """(B, tokens, D) what the UNet is given as its context: encoded prompts, or their keys and values."""
        encoded = self._prompts(prompts, tokens)
        if self._parts.context is not None:
            return self._parts.context(encoded)
        return torch.cat(encoded) if len(encoded) > 1 else encoded[0]

    def _noise(self, request: Request, plan: Plan) -> Tensor:
        """(1 + n, B, C, h, w): the first latents and the n fresh noises of the plan, per image from its own generator.

        Drawn on the CPU in float32 whatever the device and dtype, so that a seed means the same everywhere.
        """
        scale = self._parts.image_scale
        shape = (self._parts.unet.config.in_channels, request.height // scale, request.width // scale)
        count = 1 + plan.fresh_noises
        noise = torch.empty((count, len(request.seeds), *shape), dtype=torch.float32, device="cpu")
        for image, seed in enumerate(request.seeds):
            generator = torch.Generator("cpu").manual_seed(seed)
            for draw in range(count):
                torch.randn(shape, generator=generator, out=noise[draw, image])
        return noise.to(device=self.device, dtype=self._latent_dtype)

    def _run(self, request: Request, program: _Program, noise: Tensor, context: Tensor) -> Tensor:
        as_bytes = request.output == "pil"
        inputs = {"noise": noise, "context": context}
        if self._graphs is None:
            return self._generate(program, as_bytes, guidance=request.guidance, **inputs)
        if request.guidance is not None:  # a tensor, so that one recording serves every scale
            inputs["guidance"] = torch.full((), request.guidance, dtype=self._latent_dtype, device=self.device)
        key = (request.steps, tuple(noise.shape), tuple(context.shape), as_bytes)

        def function(**buffers: Tensor) -> Tensor:
            return self._generate(program, as_bytes, **buffers)

        return self._graphs.run(key, function, inputs, keeps=program)

    def _generate(
        self,
        program: _Program,
        as_bytes: bool,
        noise: Tensor,
        context: Tensor,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        """Everything between the text encoder and the result: (B, 3, H, W) in [0, 1], or (B, H, W, 3) bytes."""
        x = program.steps.begin(noise[0])
        for index, time in enumerate(program.times):
            prediction = self._predict(x.to(self.dtype), time, context, guidance)
            fresh = noise[index + 1] if index + 1 < len(noise) else None
            x = program.steps.advance(index, prediction, x, fresh)
        image = images.decode(self._parts, x.to(self.dtype))
        return images.to_bytes(image) if as_bytes else image

    def _predict(self, x: Tensor, time, context: Tensor, guidance: float | Tensor | None) -> Tensor:
        unet = self._parts.unet
        batch = x if guidance is None else torch.cat([x, x])
        if isinstance(time, Tensor):
            time = time_embedding(unet, time, len(batch), self.dtype)
        prediction = unet_forward(unet, batch, time, context)
        if guidance is None:
            return prediction
        uncond, cond = prediction.chunk(2)
        return guide(uncond, cond, guidance)

    def _explain_norms(self) -> Explanation | None:
        for module in self._parts.unet.modules():
            if isinstance(module, BoundGroupNormSiLU):
                x = torch.empty(1, module.num_channels, 8, 8, dtype=self.dtype, device=self.device)
                return explain("group_norm_silu", x, module.num_groups, module.weight, module.bias, module.eps)
        return None

    def _explain_attention(self) -> dict[str, Explanation] | None:
        found = None
        for network in self._parts.networks.values():
            for module in network.modules():
                if isinstance(module, DirectAttention):
                    found = {**(found or {}), **module.attend.explanations}
        return found

    def _explain_graphs(self) -> str:
        if self._graphs is None:
            return "not used, they need a CUDA device"
        failure = self._graphs.failure
        return f"used, {len(self._graphs)} recorded" + (f"; no more are made: {failure}" if failure else "")
