"""Processes that make pairs: of their own, so that they can be killed as the kernel kills."""

import os
import signal

import torch
from fastdistill.training import Teacher
from fastdistill.training.pairs import Source, generate

from ..toys import tiny_pipeline
from .conftest import PROMPTS

COUNT, SHARD_SIZE, BATCH_SIZE = 22, 4, 2


def described(source):
    return source.pair_set(count=COUNT, shard_size=SHARD_SIZE, steps=1, solver="euler", seed=3)


def killed_after(events, folder):
    """Make the set, but die without a word at the given number of batches, syncs and renames."""

    def die_at_last():
        nonlocal events
        events -= 1
        if events == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(function):
        def call(*arguments, **options):
            die_at_last()
            return function(*arguments, **options)

        return call

    os.replace, os.fsync = dying(os.replace), dying(os.fsync)
    _make(folder, lambda progress: die_at_last())


def one_of_several(place, meeting, folder, made, dies):
    """Make the set together with others: nobody goes on before each has a shard in hand. `dies`: is killed then."""
    met = False

    def report(progress):
        nonlocal met
        if progress.made and not met:
            met = True
            meeting.wait()
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)

    made[place] = _make(folder, report).made


def _make(folder, report):
    torch.set_num_threads(1)
    source = Source.of(Teacher(tiny_pipeline()), PROMPTS)
    return generate(source, described(source), folder, batch_size=BATCH_SIZE, report=report)
