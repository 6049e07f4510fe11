"""`python -m fastdistill.models.digits teacher | vit | evaluate | students`: train from nothing, print the figures."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

COMMAND = "python -m fastdistill.models.digits"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 2 with one clear line for bad input or a missing extra."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ImportError, ValueError, OSError) as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="The digits models: training and figures.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    teacher = commands.add_parser("teacher", help="train autoencoder, text encoder and UNet; write a pipeline folder")
    teacher.add_argument("--out", type=Path, required=True, help="folder to write; also holds intermediate results")
    teacher.add_argument("--seed", type=int, default=0)
    teacher.add_argument("--vae-steps", type=_positive, default=700)
    teacher.add_argument("--steps", type=_positive, default=4000)
    teacher.set_defaults(run=_train_teacher)

    vit = commands.add_parser("vit", help="train the feature network of ADD's discriminator; write its folder")
    vit.add_argument("--out", type=Path, required=True, help="folder to write")
    vit.add_argument("--seed", type=int, default=0)
    vit.add_argument("--steps", type=_positive, default=800)
    vit.set_defaults(run=_train_vit)

    evaluate = commands.add_parser("evaluate", help="print the figures of docs/digits.md")
    evaluate.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    evaluate.add_argument("--models", nargs="+", metavar="NAME_OR_PATH", help="default: every bundled model")
    evaluate.add_argument("--write", type=Path, nargs="+", default=[], metavar="FILE", help="put them into these files")
    evaluate.set_defaults(run=_evaluate)

    students = commands.add_parser("students", help="compare one-step students of several methods and training seeds")
    students.add_argument("folders", nargs="+", metavar="FOLDER", help="written by `fastdistill train`")
    students.add_argument("--noise-seeds", type=int, nargs="+", default=[0, 1, 2])
    students.add_argument("--write", type=Path, nargs="+", default=[], metavar="FILE", help="put them into these files")
    students.set_defaults(run=_students)

    curves = commands.add_parser("curves", help="draw how watched training runs got where they are")
    curves.add_argument("folders", nargs="+", metavar="FOLDER", help="given to `fastdistill train` as --watch")
    curves.add_argument("--picture", type=Path, required=True, metavar="FILE.png")
    curves.set_defaults(run=_curves)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; needed 1 or more")
    return value


def _log() -> Callable[[str], None]:
    start = time.monotonic()
    return lambda line: print(f"{time.monotonic() - start:6.0f} s  {line}", flush=True)


def _train_teacher(options: argparse.Namespace) -> None:
    from .cards import teacher_card
    from .folder import check_target, save_folder
    from .train_teacher import train_teacher
    from .train_vae import train_vae

    check_target(options.out)
    log = _log()

    def save(pipeline) -> None:
        save_folder(pipeline, options.out, teacher_card())

    vae = train_vae(options.vae_steps, options.seed, log)
    save(train_teacher(vae, options.steps, options.seed, log, on_report=save))
    log(f"saved {options.out}")


def _train_vit(options: argparse.Namespace) -> None:
    from .cards import vit_card
    from .train_vit import (
        HELD_OUT,
        LABEL_SMOOTHING,
        check_vit_target,
        held_out_accuracy,
        save_vit,
        shown_digits,
        train_vit,
    )

    check_vit_target(options.out)
    log = _log()
    vit = train_vit(options.steps, options.seed, log)
    accuracy = held_out_accuracy(vit)
    log(f"accuracy on {HELD_OUT} held-out digits {accuracy:.3f}")
    card = vit_card(
        parameters=sum(p.numel() for p in vit.parameters()),
        steps=options.steps,
        smoothing=LABEL_SMOOTHING,
        shown=len(shown_digits().labels),
        held_out=HELD_OUT,
        accuracy=accuracy,
    )
    save_vit(vit, options.out, card)
    log(f"saved {options.out}")


def _evaluate(options: argparse.Namespace) -> None:
    from .figures import as_markdown, measure, write_between_marks

    command = " ".join([f"{COMMAND} evaluate --seeds", *map(str, options.seeds)])
    if options.models:
        command = " ".join([f"{command} --models", *options.models])
    rows = measure(options.seeds, options.models, log=lambda line: print(line, file=sys.stderr, flush=True))
    text = f"Printed by `{command}`: {as_markdown(rows, options.seeds)}"
    print(text)
    for file in options.write:
        write_between_marks(file, text)


def _students(options: argparse.Namespace) -> None:
    from .figures import write_between_marks
    from .students import STUDENTS, as_markdown, measure_students

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    students = measure_students(options.folders, options.noise_seeds, log)
    command = " ".join([f"{COMMAND} students", *options.folders])
    text = f"Printed by `{command}`: {as_markdown(students, options.noise_seeds)}"
    print(text)
    for file in options.write:
        write_between_marks(file, text, STUDENTS)


def _curves(options: argparse.Namespace) -> None:
    from .curves import draw_curves, read_curve

    draw_curves([read_curve(folder) for folder in options.folders], options.picture)
    print(f"{options.picture}: {len(options.folders)} runs")


if __name__ == "__main__":
    sys.exit(main())
