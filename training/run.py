"""A whole run as one configuration, from a YAML file, single settings and options: read, checked, executed."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from fastdistill._output import write_files
from fastdistill.models import bundled_models, resolve_model

from .card import student_card
from .data import Data
from .digits import digits_card, digits_prompts
from .distill import Callback, Distilled, check_checkpoints, distill
from .documented import commented_yaml, shown
from .images import ImagesConfig, open_images
from .memory_plan import MemoryPlan
from .pipelines import EXPORT_DTYPES, check_output_folder
from .planning import plan_memory
from .progress import TrainingProgress
from .recipe import MethodConfig
from .registry import METHODS, config_class
from .settings import SettingsError, changed, from_dict, from_settings, from_yaml, leaves, plain, to_dict
from .teacher import Teacher
from .validation import ValidationConfig, Validator
from .watch import Watch, watch
from .world import World

RUN_FILE = "run.yaml"
DIGITS = "digits"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: whom to distil, with what, by which method, and where the student goes.

    Attributes:
        teacher: a bundled name, or a folder in the diffusers layout.
        images: real samples for the methods that train on them; a name or folder alone is its source.
        validation: what is measured of the student every `method.trainer.validate_every` updates.
        watch: folder for what is to be seen of the run: log, pictures, curves, report; null shows progress alone.
        prompts: a text file with one prompt a line, "digits" for every caption of the ten digits, or a list of prompts.
        pairs: folder of pairs that were made before; null lets a method that needs pairs make its own.
        out: pipeline folder to write; a pipeline that is there is replaced.
        export_dtype: of the student's weights on disk: float16, bfloat16 or float32.
        device: cpu, cuda, cuda:1 …; null takes a GPU if there is one.
        checkpoints: folder for checkpoints and the run's configuration (run.yaml); null keeps none. With it, SIGTERM
            and SIGINT save one and end the run with exit code 0.
        method: its settings, and those of the loop (trainer) and of the roles that train.
    """

    teacher: str = "digits-teacher"
    prompts: str | tuple[str, ...] = DIGITS
    images: ImagesConfig = ImagesConfig()
    pairs: Path | None = None
    out: Path | None = None
    export_dtype: str = "float16"
    device: str | None = None
    checkpoints: Path | None = None
    watch: Path | None = None
    validation: ValidationConfig = ValidationConfig()
    method: MethodConfig

    def __post_init__(self) -> None:
        if self.export_dtype not in EXPORT_DTYPES:
            raise ValueError(f"export_dtype must be one of {', '.join(EXPORT_DTYPES)}; got {self.export_dtype!r}")

    @property
    def is_of_digits(self) -> bool:
        return self.prompts == DIGITS


def load_run(
    method: str | None = None,
    file: str | Path | None = None,
    settings: Sequence[str] = (),
    **options: Any,
) -> RunConfig:
    """The configuration of a run: defaults, then the YAML file, then the settings, then the options, the last one wins.

    Args:
        method: name of the method; None takes it from the file.
        file: YAML with the fields of `RunConfig`; under `method` its settings, with its `name`.
        settings: lines "NAME=VALUE": a setting of the method by its dotted name, or a field of the run.
        options: fields of `RunConfig`; of the method's trainer `updates` and `precision`, and of its memory `roles`,
            `optimizer` and `checkpointing`; a `seed` for it and the images. None is not given.

    Raises:
        SettingsError: an unknown name, with the nearest known one, or a value that cannot be, saying where it was read.
        ValueError: an unknown method.
    """
    values = {} if file is None else _with_images(from_yaml(file))
    name = _method_name(method, values, file)
    run = RunConfig(method=config_class(name)())
    run = _from(f"{file}: ", RunConfig, values, run)
    for section in _by_section(from_settings(settings), run):
        if "method" in section:
            run = replace(run, method=_from("--set ", type(run.method), section["method"], run.method))
        else:
            run = _from("--set ", RunConfig, _with_images(section), run)
    for option, value in options.items():
        if value is not None:
            nested = _with_images(_nested(option, value))
            run = _from(f"--{option.replace('_', '-')} {value}: ", RunConfig, nested, run)
    return run


def run_of(facts: Mapping[str, Any]) -> RunConfig:
    """The run that a student's `fastdistill.json` tells of, without the places it was written to.

    Raises:
        SettingsError: a configuration of another version of this package.
    """
    told = {name: value for name, value in facts.get("run", {}).items() if name != "example"}
    return from_dict(RunConfig, told | {"method": facts["config"]}, RunConfig(method=config_class(facts["method"])()))


def run_yaml(run: RunConfig) -> str:
    """The whole configuration with what every setting means as comments: what `load_run` reads."""
    return f"# fastdistill train {run.method.method} --config THIS_FILE\n\n{commented_yaml(run)}"


def command(run: RunConfig, out: str | None = None) -> str:
    """The command line that makes this run again: its options that are not at their defaults.

    out: in place of `run.out`.
    """
    seed = run.method.trainer.seed
    default = changed(RunConfig(method=type(run.method)()), **_nested("seed", seed))
    before = {name: value for name, value, *_ in leaves(default)}
    given = {name: value for name, value, *_ in leaves(run) if name not in before or value != before[name]}
    words = ["fastdistill", "train", run.method.method, "--teacher", run.teacher]
    words += (
        ["--set", f"prompts={shown(run.prompts)}"] if isinstance(run.prompts, tuple) else ["--prompts", run.prompts]
    )
    for name, option in _OPTIONS.items():
        if name in given:
            words += [option, str(given.pop(name))]
    words += ["--out", out or str(run.out), "--seed", str(seed)]
    for name, value in given.items():
        if name not in _UNSAID:
            words += ["--set", f"{name.removeprefix('method.')}={shown(value)}"]
    return shlex.join(words)


def check_run(run: RunConfig, *, resume: bool = False, writes: bool = True) -> list[str]:
    """The prompts of a run that can start, as far as that is known before anything is computed or written.

    Raises:
        ValueError: naming what cannot be: prompts, teacher, pairs, device, checkpoints.
        OSError: `out` cannot be written.
    """
    prompts = read_prompts(run.prompts)
    if writes:
        if run.out is None:
            raise ValueError("out: is missing; needed --out FOLDER, where the student goes")
        check_output_folder(run.out)
    if resume and run.checkpoints is None:
        raise ValueError("--resume needs --checkpoints, the folder of the run to continue")
    if not (resume and was_begun(run.checkpoints)):
        check_checkpoints(run.checkpoints, resume)
    resolve_model(run.teacher)
    if run.pairs is not None and not run.pairs.is_dir():
        raise ValueError(f"pairs {run.pairs}: no such folder")
    chosen_device(run.device)
    trainer = run.method.trainer
    if run.validation.kind == "none" and (trainer.validate_every > 0 or trainer.deliver == "best"):
        raise ValueError(
            f"validation.kind none: trainer.validate_every {trainer.validate_every} and trainer.deliver "
            f"{trainer.deliver!r} need figures; needed --set validation.kind=digits or reference"
        )
    return prompts


def was_begun(checkpoints: Path) -> bool:
    """Whether a run has come to its first update there."""
    return (checkpoints / RUN_FILE).is_file()


def open_data(run: RunConfig, teacher: Teacher, world: World | None = None) -> Data | None:
    """The real samples of a run, None if it has none."""
    return None if run.images.source is None else open_images(run.images, teacher, world)


def train(
    run: RunConfig,
    *,
    resume: bool = False,
    callback: Callback | None = None,
    world: World | None = None,
    planned: Callable[[MemoryPlan | None, str], None] | None = None,
) -> Distilled:
    """Execute a run up to its student, which is not yet saved (`save_student`), and show its progress.

    With `run.checkpoints`, the configuration is written there as `run.yaml` when the first update is about to be made.
    `planned` is told, before anything is made, what memory the run will take; or None and why that is not known.
    All else is as in `distill`.

    Raises: as `check_run`, `distill`, `fastdistill.training.images.open_images` and
        `fastdistill.training.watch.watch`.
    """
    prompts = check_run(run, resume=resume)
    teacher = Teacher(run.teacher, chosen_device(run.device))
    images = open_data(run, teacher, world)
    if planned is not None:
        try:
            planned(memory_of(run, teacher, len(prompts), images), "")
        except (ValueError, RuntimeError) as error:  # fake tensors know not everything that real ones do
            planned(None, str(error))
    validate = Validator(run.validation, teacher, prompts) if run.validation.kind != "none" else None
    with watch(
        run.watch,
        teacher=None if run.watch is None else teacher,
        prompts=prompts,
        config=run.method,
        out=run.out,
        command="" if run.out is None else command(run),
        resume=resume,
        world=world,
    ) as seeing:
        result = distill(
            teacher,
            prompts,
            run.method,
            images=images,
            pairs=run.pairs,
            callback=_Callbacks(seeing, callback, None if world is not None and not world.is_first else run),
            checkpoints=run.checkpoints,
            # One that was killed before its first checkpoint begins again.
            resume=resume and any(run.checkpoints.glob("*/step-*")),
            validate=validate,
            world=world,
        )
    return replace(result, facts=result.facts | {"run": _facts(run, prompts)})


def memory_of(run: RunConfig, teacher: Teacher, prompts: int, images: Data | None) -> MemoryPlan:
    """The memory plan of a run whose teacher and images are open.

    Raises: as `plan_memory`.
    """
    given = run.pairs is not None
    return plan_memory(run.method, teacher, prompts=prompts, images=images, pairs_given=given, device=teacher.device)


class _Callbacks:
    """What watches a run, what the caller wants to know of it, and the record of its configuration."""

    def __init__(self, seeing: Watch, own: Callback | None, run: RunConfig | None) -> None:
        self._seeing, self._own, self._run = seeing, own, run

    def begin(self, progress: TrainingProgress) -> None:
        # Not before: what is refused until then leaves nothing behind.
        if self._run is not None and self._run.checkpoints is not None:
            write_files({self._run.checkpoints / RUN_FILE: run_yaml(self._run).encode()})
        self._seeing.begin(progress)

    def __call__(self, progress: TrainingProgress) -> bool | None:
        self._seeing(progress)
        return self._own(progress) if self._own is not None else None

    def end(self, progress: TrainingProgress) -> None:
        self._seeing.end(progress)


def save_student(run: RunConfig, result: Distilled) -> Path:
    """The student of a run as a pipeline folder at `run.out`, with its model card."""
    name = run.out.name
    card = student_card(name, result.facts, teacher_folder=result.teacher_folder, command=command(run, out=name))
    if run.is_of_digits and run.teacher in bundled_models():
        card = digits_card(name, command(run, out=name), result.facts)
    return result.save(run.out, card, dtype=EXPORT_DTYPES[run.export_dtype])


def read_prompts(prompts: str | Sequence[str]) -> list[str]:
    """What `RunConfig.prompts` stands for.

    Raises:
        ValueError: no such file, or no prompt in it or in the list.
    """
    if prompts == DIGITS:
        return digits_prompts()
    if isinstance(prompts, str):
        try:
            lines = Path(prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f'prompts {prompts}: {reason}; needed a text file with one prompt a line, or "{DIGITS}"'
            ) from error
    else:
        lines = list(prompts)
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"prompts {prompts if isinstance(prompts, str) else list(prompts)}: there is no prompt in it")
    return found


def chosen_device(name: str | None) -> torch.device:
    """The device of this name; None is a GPU if there is one.

    Raises:
        ValueError: no device, or one that is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name}: needed cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name}: needed cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name}: this torch sees no NVIDIA GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return device


# What has an option of its own.
_OPTIONS = {
    "images.source": "--images",
    "pairs": "--pairs",
    "device": "--device",
    "export_dtype": "--export-dtype",
    "method.trainer.updates": "--updates",
    "method.trainer.precision": "--precision",
    "method.trainer.memory.roles": "--roles",
    "method.trainer.memory.optimizer": "--optimizer",
    "method.trainer.memory.checkpointing": "--checkpointing",
}
# What is said already, or does not change the student.
_UNSAID = ("teacher", "prompts", "out", "checkpoints", "watch", "method.trainer.seed")


def _method_name(method: str | None, values: dict[str, Any], file: str | Path | None) -> str:
    """Which method is meant; `values` are left with its settings alone."""
    section = values.get("method")
    section = {"name": section} if isinstance(section, str) else {} if section is None else section
    if not isinstance(section, dict):
        raise SettingsError(f"{file}: method: needed a name, or settings; got {section!r}")
    section = dict(section)
    named = section.pop("name", None)
    if file is not None:
        values["method"] = section
    if method is None and named is None:
        raise SettingsError(f"{file}: method.name: is missing; known are {', '.join(METHODS)}")
    if None not in (method, named) and method != named:
        raise SettingsError(f"{file}: method.name: the file is for {named}; the command is {method}")
    return method or named


def _with_images(values: dict[str, Any]) -> dict[str, Any]:
    """A source alone, in place of settings."""
    source = values.get("images")
    return values | {"images": {"source": source}} if isinstance(source, str) else values


def _nested(option: str, value: Any) -> dict[str, Any]:
    if option in ("updates", "precision"):
        return {"method": {"trainer": {option: value}}}
    if option in ("roles", "optimizer", "checkpointing"):
        return {"method": {"trainer": {"memory": {option: value}}}}
    if option == "seed":
        return {"method": {"trainer": {"seed": value}}, "images": {"seed": value}}
    return {option: value}


def _by_section(values: dict[str, Any], run: RunConfig) -> list[dict[str, Any]]:
    """The settings of the method, which come first where a name is both's, and the fields of the run."""
    of_method = {field.name for field in fields(run.method)}
    of_run = {field.name for field in fields(run)} - {"method"}
    method, rest = {}, {}
    for name, value in values.items():
        if name == "method" and isinstance(value, dict):
            method |= value
        elif name not in of_method and (name in of_run or difflib.get_close_matches(name, of_run - of_method, n=1)):
            rest[name] = value
        else:
            method[name] = value
    return [{"method": method}] * bool(method) + [rest] * bool(rest)


def _from(source: str, kind: type, values: dict[str, Any], before: Any) -> Any:
    try:
        return from_dict(kind, values, before)
    except SettingsError as error:
        raise SettingsError(f"{source}{error}") from error.__cause__


def _facts(run: RunConfig, prompts: list[str]) -> dict[str, Any]:
    """The run beside its method, whose configuration has a place of its own."""
    facts = {
        name: value for name, value in to_dict(run).items() if name not in ("method", "out", "checkpoints", "watch")
    }
    return plain(facts) | {"example": prompts[0]}
