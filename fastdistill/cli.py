"""The command `fastdistill`: info, models, generate, demo, metrics, bench, tune, train, plan, pairs, evaluate, ablate.

The roof of the house: each command imports its room when it is called, so that `--help` needs neither torch nor
diffusers. Whatever a user can get wrong ends in one line on stderr and exit code 2; Ctrl-C in one line and 130.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.core import TyperGroup

import fastdistill

PROGRAM = "fastdistill"
TRACEBACK = "FASTDISTILL_TRACEBACK"  # set: show where an error came from instead of one line
DEVICES = "cpu, cuda, cuda:1, ..."


class _OneLineErrors(TyperGroup):
    """Commands whose foreseeable failures are one line; a defect of this package still shows its traceback."""

    def main(self, args: Sequence[str] | None = None, **_) -> NoReturn:
        try:
            code = super().main(args=args, prog_name=PROGRAM, standalone_mode=False)
        except (KeyboardInterrupt, typer.Abort):
            code = _complain("interrupted", 130)
        except Exception as error:
            if os.environ.get(TRACEBACK) or not _is_foreseeable(error):
                raise
            code = _complain(_message(error), 2)
        sys.exit(code or 0)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # here, because typer versions disagree on what they make of it
            raise typer.Abort from None


def _is_foreseeable(error: Exception) -> bool:
    """Bad input (ValueError, with ModelError), files (OSError), missing extras (ImportError), wrong command lines
    (they format themselves, in whichever library typer takes them from) and a backend that cannot serve."""
    backends = sys.modules.get("fastdistill.ops")  # no such error where the ops were never imported
    foreseen = (ValueError, OSError, ImportError, *((backends.BackendError,) if backends else ()))
    return isinstance(error, foreseen) or hasattr(error, "format_message")


def _message(error: Exception) -> str:
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    if context:
        text = f"{text.rstrip('.')} (see {context.command_path} --help)"
    return " ".join(text.split()) or type(error).__name__


def _complain(message: str, code: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return code


app = typer.Typer(
    cls=_OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `argv` (default: that of the process) and exit with its code."""
    app(args=argv)


@app.callback(invoke_without_command=True)
def _fastdistill(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """One-step diffusion: fused kernels, an inference engine and distillation."""
    if version:
        print(f"{PROGRAM} {fastdistill.__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
    if not os.environ.get(TRACEBACK):
        _quiet_libraries()


def _quiet_libraries() -> None:
    """Remarks of libraries to programmers are not for someone who typed a command. Read when they are imported."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Show versions, compiled libraries, which backend serves each op and why others do not, and GPUs."""
    from fastdistill.info import collect, render

    facts = collect()
    if as_json:
        import json

        print(json.dumps(facts, indent=2))
    else:
        from rich.console import Console

        Console().print(render(facts))


@app.command()
def models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the architectures and models that have a name, with their sizes and numbers of parameters."""
    from fastdistill.models.listing import collect, render

    rows = collect()
    if as_json:
        import json

        print(json.dumps(rows, indent=2))
    else:
        from rich.console import Console

        from fastdistill.bench.report import print_wide

        print_wide(Console(), render(rows))


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="One image is made of each.")],
    model: Annotated[str, typer.Option(help="A bundled name, or a folder in the diffusers layout.")] = "digits-dmd",
    out: Annotated[
        Path, typer.Option(metavar="FILE.png", help="Several prompts without --grid make FILE-0.png, FILE-1.png, ...")
    ] = Path("generated.png"),
    seed: Annotated[int, typer.Option(min=0, help="Image i starts from the noise of seed + i.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps; a distilled student needs 1.")] = 1,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; up to 1 it is off.")] = 0.0,
    grid: Annotated[bool, typer.Option("--grid", help="Put all images into one picture, FILE.png.")] = False,
    scale: Annotated[int, typer.Option(min=1, max=64, help="Enlarge each image this many times.")] = 1,
    device: Annotated[str | None, typer.Option(show_default="a GPU if there is one", help=DEVICES)] = None,
) -> None:
    """Make an image of each prompt."""
    _check_prompts(prompts)
    single = grid or len(prompts) == 1
    paths = [out] if single else [out.with_stem(f"{out.stem}-{index}") for index in range(len(prompts))]
    _check_pictures(paths)

    from fastdistill.models import resolve_model

    resolve_model(model)

    from fastdistill import OneStepPipeline, _output, _pictures

    start = time.perf_counter()
    pipe = OneStepPipeline.from_pretrained(model, device=device)
    loaded = time.perf_counter()
    images = pipe(prompts, seed=seed, steps=steps, guidance_scale=guidance_scale)
    made = time.perf_counter()

    pictures = [_pictures.enlarge(image, scale) for image in images]
    texts = [" | ".join(prompts)] if single else prompts
    if grid:
        pictures = [_pictures.grid(pictures)]
    _output.write_files(
        {
            path: _pictures.png(picture, {"prompt": text, "parameters": f"model={model} steps={steps} seed={seed}"})
            for path, picture, text in zip(paths, pictures, texts)
        }
    )
    for path, picture in zip(paths, pictures):
        print(f"{path}  {picture.width} x {picture.height}")
    print(
        f"{len(images)} image{'s' if len(images) > 1 else ''} by {model} in {steps} step{'s' if steps > 1 else ''}: "
        f"{1000 * (made - loaded) / len(images):.1f} ms per image, first call included; "
        f"the model was loaded in {loaded - start:.1f} s"
    )


def _check_prompts(prompts: Sequence[str]) -> None:
    """Before a model is loaded; whether a prompt is too long only the model's tokenizer can tell."""
    for position, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"prompt {position} of {len(prompts)} is empty; needed words, like 'a handwritten seven'")


def _check_pictures(paths: Sequence[Path]) -> None:
    from fastdistill import _output

    for path in paths:
        if path.suffix.lower() != ".png":
            raise ValueError(f"--out {path}: needed a name that ends in .png")
        _output.check_file(path)


@app.command()
def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where demo.html and demo.png go.")] = Path("demo"),
    train: Annotated[str | None, typer.Option(metavar="METHOD", help="Also distil a student now: dmd.")] = None,
    minutes: Annotated[float, typer.Option(help="How long --train distils.")] = 1.0,
    teacher: Annotated[str, typer.Option(help="A digits pipeline: bundled name or folder.")] = "digits-teacher",
    student: Annotated[str, typer.Option(help="Its one-step student: bundled name or folder.")] = "digits-dmd",
    teacher_steps: Annotated[int, typer.Option(min=2, help="Steps of the teacher.")] = 25,
    images: Annotated[int, typer.Option(help="Images that each figure is measured on.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Image i starts from the noise of seed + i.")] = 0,
    device: Annotated[str | None, typer.Option(show_default="a GPU if there is one", help=DEVICES)] = None,
) -> None:
    """See a teacher and its one-step student draw the ten digits, timed and scored, as a page and a picture."""
    from fastdistill import _output
    from fastdistill.models import resolve_model

    page, sheet = out / "demo.html", out / "demo.png"
    _output.check_folder(out, page, sheet)
    for model in (teacher, student):
        resolve_model(model)

    from rich.console import Console

    from fastdistill import _pictures
    from fastdistill.demo import render_html, render_sheet, run, summary, warning

    with _progress() as report:
        result = run(
            teacher,
            student,
            teacher_steps=teacher_steps,
            images=images,
            seed=seed,
            train=train,
            minutes=minutes,
            device=device,
            command=_command_line(ctx),
            report=report,
        )
    picture = _pictures.png(render_sheet(result))
    _output.write_files({page: render_html(result).encode(), sheet: picture})
    Console().print(summary(result))
    if warning(result):
        print(warning(result))
    print(page)
    print(sheet)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float, float], None]]:
    """A bar on stderr, gone when all is done; what it shows is what the function it gives was last called with."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # In a log file every redraw would be a line of its own.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _command_line(ctx: typer.Context) -> str:
    """What to type to call this command again: its name, and the options that are not at their defaults."""
    words = ctx.command_path.split()
    for option in ctx.command.params:
        value = ctx.params.get(option.name)
        if value is not None and str(value) != str(option.default):
            words += [option.opts[0], str(value)]
    return shlex.join(words)


@app.command()
def metrics(
    real: Annotated[Path, typer.Argument(metavar="REAL", help="A folder of pictures, or features (N, D): .npy, .npz.")],
    fake: Annotated[Path, typer.Argument(metavar="FAKE", help="The set to be judged, of the same kind.")],
    size: Annotated[int, typer.Option(min=1, help="Pictures are area-averaged to SIZE x SIZE pixels.")] = 8,
    k: Annotated[int, typer.Option(min=1, help="Neighbours, for precision and recall.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Compare two sets: Frechet distance, precision, recall, sliced Wasserstein distance, of pixels or features."""
    import json

    from fastdistill.metrics.compare import compare

    figures = compare(real, fake, size, k)
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):20}{value:.4f}" if isinstance(value, float) else f"{name:20}{value}")


_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASS_ON, add_help_option=False)
def bench(ctx: typer.Context) -> None:
    """Measure an op against PyTorch: `fastdistill bench --help` tells how."""
    _run_module("fastdistill.bench", ctx.args)


@app.command()
def tune(
    op: Annotated[str, typer.Argument(metavar="OP", help="attention: the one op whose backends a table chooses.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default="the user's own table of the device, used from then on")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu.")] = "cuda",
    shapes: Annotated[str | None, typer.Option(show_default="all", help="Suites or sites of the benchmark.")] = None,
    dtype: Annotated[str, typer.Option(help="A list of float32, float16, bfloat16.")] = "bfloat16,float16",
    pairs: Annotated[int | None, typer.Option(min=1, show_default="30 or 100", help="Samples per backend.")] = None,
) -> None:
    """Measure the backends of an op on this device and write the table that chooses among them."""
    if op != "attention":
        raise ValueError(f"op {op!r}: no table chooses its backends; known: attention")
    from fastdistill.bench.attention_tune import tune as measure

    path, rows = measure(out, device, None if shapes is None else shapes.split(","), tuple(dtype.split(",")), pairs)
    for row in rows:
        if row.status in ("failed", "raised"):
            why = row.missing or "its error exceeds the limit"
            print(f"left out: {row.key.provider} at {row.key.case}, {row.key.dtype}, {row.key.mode}: {why}")
    print(path)


@app.command(context_settings=_PASS_ON, add_help_option=False)
def train(ctx: typer.Context) -> None:
    """Distil a model into one step: `fastdistill train --help` tells how."""
    _run_module("fastdistill.training", ctx.args)


@app.command()
def plan(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="dmd, dmd2, add, reflow or instaflow.")],
    arch: Annotated[
        str, typer.Option(help="sd15, sd21, sdxl, ...: an architecture; or a pipeline folder, with or without weights.")
    ] = "sd15",
    batch: Annotated[int | None, typer.Option(min=1, help="Samples per device.", show_default="the method's")] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Pixels of a side.", show_default="the architecture's")
    ] = None,
    roles: Annotated[str | None, typer.Option(help="full, or lora:RANK.", show_default="full")] = None,
    optimizer: Annotated[str | None, typer.Option(help="auto, float32 or 8bit.", show_default="auto")] = None,
    checkpointing: Annotated[
        str | None, typer.Option(help="auto, none, recompute or blocks.", show_default="auto")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.", show_default="auto")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, as of `fastdistill train METHOD`."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts whose embeddings the run holds.")] = 1000,
    device: Annotated[str, typer.Option(help="That the run is for: cuda or cpu.")] = "cuda",
    largest: Annotated[int, typer.Option(min=0, help="Name so many tensors at the highest point of each turn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """How much memory a training run would take, by role and turn, found without a GPU and without weights."""
    if device not in ("cuda", "cpu"):
        raise ValueError(f"--device {device}: needed cuda or cpu")

    from fastdistill.training.memory_report import render
    from fastdistill.training.plan_command import planned_config
    from fastdistill.training.planning import plan_memory

    given = {"batch": batch, "roles": roles, "optimizer": optimizer, "checkpointing": checkpointing}
    config = planned_config(method, settings or [], **given, precision=precision)
    found = plan_memory(config, arch, resolution=resolution, prompts=prompts, device=device, largest=largest)
    if as_json:
        import json

        print(json.dumps(found.to_dict(), indent=2))
    else:
        from rich.console import Console

        Console().print(render(found), soft_wrap=True, highlight=False)


@app.command(context_settings=_PASS_ON, add_help_option=False)
def pairs(ctx: typer.Context) -> None:
    """Make, inspect and verify sets of a teacher's pairs: `fastdistill pairs --help` tells how."""
    _run_module("fastdistill.training.pairs", ctx.args)


@app.command(context_settings=_PASS_ON, add_help_option=False)
def evaluate(ctx: typer.Context) -> None:
    """Print the figures of a model over many images: `fastdistill evaluate --help` tells how."""
    _run_module("fastdistill.training.evaluation", ctx.args)


@app.command()
def ablate(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="add: the one whose paper's table is repeated.")],
    out: Annotated[
        Path,
        typer.Option(metavar="FILE.json", help="Written after every run; none that is there is repeated."),
    ] = Path("ablation.json"),
    updates: Annotated[int | None, typer.Option(min=1, show_default="as `train add`", help="Of every row.")] = None,
    seeds: Annotated[str, typer.Option(help="Training seeds of every row, a list.")] = "0",
    rows: Annotated[str | None, typer.Option(show_default="all", help="A list of names or groups of rows.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of `train add`, of all rows."),
    ] = None,
    teacher: Annotated[str, typer.Option(help="A digits pipeline: bundled name or folder.")] = "digits-teacher",
    device: Annotated[str, typer.Option(help=DEVICES)] = "cpu",
) -> None:
    """Repeat the table of ablations of a method's paper on the digits, every row with as many updates."""
    if method != "add":
        raise ValueError(f"method {method!r}: no table of ablations; known: add")
    names = [name.strip() for name in rows.split(",")] if rows else None
    if not all(seed.strip().isdigit() for seed in seeds.split(",")):
        raise ValueError(f"--seeds {seeds}: needed a list of whole numbers, as 0,1,2")

    from fastdistill import _output
    from fastdistill.models import resolve_model

    _output.check_file(out)
    resolve_model(teacher)

    from fastdistill.training import ADDConfig
    from fastdistill.training.ablate import ablate, as_markdown, chosen_rows
    from fastdistill.training.settings import changed, from_dict, from_settings

    config = from_dict(ADDConfig, from_settings(settings or []))
    if updates is not None:
        config = changed(config, trainer={"updates": updates})
    chosen = chosen_rows(names)
    with _progress() as show:
        table = ablate(
            out,
            config=config,
            rows=chosen,
            seeds=[int(seed) for seed in seeds.split(",")],
            teacher=teacher,
            device=device,
            report=show,
        )
    print(as_markdown(table, chosen))
    print(out)


def _run_module(module: str, arguments: Sequence[str]) -> None:
    """`python -m module arguments`, in this process: its exit code is ours."""
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
