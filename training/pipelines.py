"""From a teacher's diffusers pipeline to what a loop needs, and from a student back to a pipeline folder."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .files import partial, sync

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler

FACTS_FILE = "fastdistill.json"
EXPORT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class TeacherError(ValueError):
    """A pipeline that this loop cannot distil; the message is one line that says what is missing."""


def check_teacher(pipeline: DiffusionPipeline) -> None:
    """Raise a `TeacherError` unless this is a text-to-image pipeline like Stable Diffusion 1, 2 or XL."""
    name = type(pipeline).__name__
    for part in ("unet", "text_encoder", "tokenizer", "scheduler"):
        if getattr(pipeline, part, None) is None:
            raise TeacherError(f"teacher {name} has no {part}; needed a pipeline like Stable Diffusion")
    unet = pipeline.unet.config
    if unet.get("addition_embed_type") not in (None, "text_time"):
        raise TeacherError(f"teacher {name} embeds {unet.addition_embed_type!r}; known is SDXL's text_time")
    if unet.get("time_cond_proj_dim") is not None:
        raise TeacherError(f"teacher {name} is guidance-distilled (it embeds the guidance scale): use its own teacher")
    if not isinstance(getattr(pipeline.scheduler, "alphas_cumprod", None), Tensor):
        raise TeacherError(
            f"teacher {name} with {type(pipeline.scheduler).__name__} is a flow model; "
            "this loop distils variance-preserving teachers (with alphas_cumprod) only"
        )


def one_step_scheduler(scheduler, timestep: int) -> DDIMScheduler:
    """A DDIM scheduler whose single step starts from unit noise at `timestep` and ends in the student's x0.

    "Trailing" spacing starts from the last timestep. For any other one the schedule is cut off behind it: pipelines
    overwrite a "leading" scheduler's offset when they are opened. An epsilon network at pure noise is read with the
    coefficients from before the terminal SNR was set to zero, which is the scheduler without the rescaling.
    """
    from diffusers import DDIMScheduler

    config = scheduler.config
    # As keywords: from_config ignores what its dictionary says of options that once were left at their default.
    options = {"timestep_spacing": "trailing", "steps_offset": 1, "set_alpha_to_one": True}
    options |= {"clip_sample": False, "thresholding": False}
    if timestep < config.num_train_timesteps - 1:
        betas = scheduler.betas[: timestep + 1].tolist()  # already rescaled, if they are
        options |= {"num_train_timesteps": timestep + 1, "trained_betas": betas, "rescale_betas_zero_snr": False}
    elif config.get("prediction_type", "epsilon") == "epsilon":
        options["rescale_betas_zero_snr"] = False
    return DDIMScheduler.from_config(config, **options)


def renoising_scheduler(scheduler, timesteps: Sequence[int]) -> LCMScheduler:
    """An LCM scheduler that visits exactly these timesteps, descending, when it is asked for as many steps.

    Each step's x0 is diffused with fresh noise to the next timestep, and the last one's is the sample. LCM's boundary
    condition, which mixes some of x_t into x0, is made to vanish. A schedule that goes on beyond the first timestep is
    cut off behind it.

    Raises:
        ValueError: timesteps that LCM's even spacing does not reach, or an epsilon network at pure noise.
    """
    from diffusers import LCMScheduler

    config, timesteps = scheduler.config, list(timesteps)
    options = {"timestep_scaling": 1e10, "original_inference_steps": len(timesteps)}
    options |= {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True}
    if timesteps[0] < config.num_train_timesteps - 1:
        betas = scheduler.betas[: timesteps[0] + 1].tolist()  # already rescaled, if they are
        options |= {"num_train_timesteps": len(betas), "trained_betas": betas, "rescale_betas_zero_snr": False}
    elif config.get("prediction_type", "epsilon") == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"several steps from t = {timesteps[0]}: an epsilon network says nothing about x0 at this schedule's pure "
            "noise; start at an earlier timestep, or use a teacher that predicts v"
        )
    found = LCMScheduler.from_config(config, **options)
    found.set_timesteps(len(timesteps))
    if found.timesteps.tolist() != timesteps:
        raise ValueError(
            f"timesteps {timesteps}: an LCM scheduler visits {found.timesteps.tolist()} in {len(timesteps)} steps; "
            "needed evenly spaced ones"
        )
    return found


def student_pipeline(teacher: DiffusionPipeline, student: nn.Module, scheduler) -> DiffusionPipeline:
    """The teacher's pipeline with the student's network and the scheduler; all else is shared, not copied."""
    pipeline = copy.copy(teacher)
    pipeline.register_modules(unet=student, scheduler=scheduler)
    return pipeline


def save_pipeline(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    facts: dict,
    *,
    card: str | None = None,
    dtype: torch.dtype = torch.float16,
    frozen_parts: str | Path | None = None,
) -> None:
    """Write a pipeline folder that plain diffusers opens, replacing `folder` only once everything is written.

    Args:
        pipeline: its UNet is saved in `dtype`, its scheduler as it is.
        folder: an existing pipeline folder is replaced; anything else that is not empty raises.
        facts: what it was trained with and how to sample it, as `fastdistill.json` beside `model_index.json`.
        card: the model card, Markdown, as `README.md`.
        frozen_parts: the teacher's folder, whose other components are then copied byte for byte. Without it they are
            saved from memory, in their dtype.

    Raises:
        FileExistsError: `folder` holds something else. OSError: it cannot be written; what was there is there.
        ValueError: a weight that is finite, but not in `dtype`.
    """
    folder = Path(folder)
    check_output_folder(folder)
    unet = _cast(pipeline.unet, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = partial(folder)  # always the same: what a killed process left there is not left for ever
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        fresh = scratch / folder.name
        if frozen_parts is None:
            pipeline.save_pretrained(fresh, safe_serialization=True)
            shutil.rmtree(fresh / "unet")
        else:
            _copy_frozen_parts(pipeline, Path(frozen_parts), fresh)
        unet.save_pretrained(fresh / "unet", safe_serialization=True)
        pipeline.scheduler.save_pretrained(fresh / "scheduler")
        for config in (fresh / "unet" / "config.json", fresh / "scheduler" / "scheduler_config.json"):
            content = json.loads(config.read_text(encoding="utf-8"))
            content.pop("_name_or_path", None)  # where it was loaded from means nothing to others
            config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (fresh / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if card is not None:
            (fresh / "README.md").write_text(card, encoding="utf-8")
        for path in fresh.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
            sync(path)
        if folder.exists():
            os.replace(folder, scratch / "before")
        os.replace(fresh, folder)
        sync(folder.parent)
    except SafetensorError as error:
        raise OSError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_output_folder(folder: str | Path) -> None:
    """Raise unless `folder` is new, empty, or a pipeline folder (to be replaced), in a place that can be written."""
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "model_index.json").is_file()):
        raise FileExistsError(f"{folder} exists and is not a pipeline folder; it is left as it is")
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(f"{folder} cannot be written: no permission in {parent}")


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over names, dtypes and bytes of a network's weights, to tell which teacher a student had."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in `dtype`, in the plain order of memory.

    Raises:
        ValueError: a tensor that overflows, named, with its largest value.
    """
    cast = nn.Module.to(copy.deepcopy(network), dtype).to(memory_format=torch.contiguous_format)
    before = network.state_dict()
    for name, tensor in cast.state_dict().items():
        if not tensor.isfinite().all():
            largest = before[name].abs().max().item()
            name_of = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"the student's {name} cannot be saved as {name_of}: it holds {largest:g}, and {name_of} ends at "
                f"{torch.finfo(dtype).max:g}; export it as {_wider(dtype)}"
            )
    return cast


def _wider(dtype: torch.dtype) -> str:
    return "bfloat16 or float32" if dtype == torch.float16 else "float32"


def _copy_frozen_parts(pipeline: DiffusionPipeline, source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for part in source.iterdir():
        if part.is_dir() and part.name not in ("unet", "scheduler") and not part.name.startswith("."):
            shutil.copytree(part, target / part.name)
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    index.pop("_name_or_path", None)
    for part in ("unet", "scheduler"):  # which may be of another class than the teacher's
        index[part] = list(pipeline.config[part])
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
