"""The command `fastdistill`: info, generate, demo, bench, train.

The roof of the house: each command imports its room when it is called, so that `--help` needs neither torch nor
diffusers. Whatever a user can get wrong ends in one line on stderr and exit code 2; Ctrl-C in one line and 130.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.core import TyperGroup

import fastdistill

PROGRAM = "fastdistill"
TRACEBACK = "FASTDISTILL_TRACEBACK"


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
    hint = f" (see {context.command_path} --help)" if context else ""
    return (" ".join(text.split()) or type(error).__name__) + hint


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
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One image is made of each.")],
    model: Annotated[str, typer.Option(help="A bundled name, or a folder in the diffusers layout.")] = "digits-dmd",
    out: Annotated[
        Path, typer.Option(metavar="FILE.png", help="Several prompts without --grid make FILE-0.png, FILE-1.png, ...")
    ] = Path("generated.png"),
    seed: Annotated[int, typer.Option(min=0, help="Image i starts from the noise of seed + i.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps; a distilled student needs 1.")] = 1,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; up to 1 it is off.")] = 0.0,
    grid: Annotated[bool, typer.Option("--grid", help="Put all images into one picture, FILE.png.")] = False,
    scale: Annotated[int, typer.Option(min=1, max=64, help="Enlarge each image this many times.")] = 1,
    device: Annotated[
        str | None, typer.Option(show_default="a GPU if there is one", help="cpu, cuda, cuda:1, ...")
    ] = None,
) -> None:
    """Make an image of each prompt."""
    for position, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"prompt {position} of {len(prompts)} is empty; needed a few words, like 'a handwritten seven'")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: needed a name that ends in .png")
    single = grid or len(prompts) == 1
    paths = [out] if single else [out.with_stem(f"{out.stem}-{index}") for index in range(len(prompts))]

    from fastdistill import _output
    from fastdistill.models import resolve_model

    for path in paths:
        _output.check_file(path)
    resolve_model(model)

    from fastdistill import OneStepPipeline, _pictures

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


_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASS_ON, add_help_option=False)
def bench(ctx: typer.Context) -> None:
    """Measure an op against PyTorch: the arguments of `python -m fastdistill.bench`."""
    from fastdistill.bench.__main__ import main as run

    raise typer.Exit(run(ctx.args) or 0)


@app.command(context_settings=_PASS_ON, add_help_option=False)
def train(ctx: typer.Context) -> None:
    """Distil a model into one step: the arguments of `python -m fastdistill.training`."""
    from fastdistill.training.__main__ import main as run

    raise typer.Exit(run(ctx.args) or 0)
