"""A run that is killed, again and again, at any moment, ends in the bits of one that was not."""

import json
import os
import random
import signal
import time

import pytest
import torch
from fastdistill.training import checkpoint
from fastdistill.training.__main__ import app
from fastdistill.training.watch import watching
from PIL import Image
from safetensors.torch import load_file

from fastdistill._pictures import png

from .processes import killed_at, run

DMD = ["dmd", "--set=critic_ratio=2", "--set=pairs=32", "--set=pair_steps=2", "--set=trainer.accumulation=2"]
INSTAFLOW = ["instaflow", "--set=reflow.pairs=32", "--set=reflow.pair_steps=2", "--set=reflow.straightness_samples=2"]
COMMON = ["--prompts=digits.txt", "--device=cpu", "--export-dtype=float32"]
COMMON += [f"--set=trainer.{setting}" for setting in ("batch_size=4", "report_every=1", "checkpoint_every=1")]


def train(folder, arguments, dying_in=None):
    """The command line in this process. `dying_in`: (save, system call) of a checkpoint, counted from 0."""
    torch.set_num_threads(1)
    os.chdir(folder)
    with open("output.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if dying_in is not None:
        _die_in(*dying_in)
    watching.PICTURES_OF_A_STAGE = 2
    watching.plot_png = lambda lines, group, colours: png(Image.new("RGB", (1, 1)), {})  # takes time, tested elsewhere
    app([*arguments, *COMMON, "--out=student", "--checkpoints=run", "--watch=seen"])


def _die_in(number, call):
    save, saves = checkpoint.save, iter(range(10**6))

    def counted(*given, **options):
        # Or the first one after it that is long enough: a stage that is finished has nothing left to write.
        if next(saves) < number:
            return save(*given, **options)
        with killed_at(call):
            return save(*given, **options)

    checkpoint.save = counted


class Killed:
    """A command that is killed and taken up again in one folder.

    Attributes:
        moments: what the kills interrupted: "save" where one was certainly in a checkpoint's writing, else "any".
    """

    def __init__(self, folder, arguments):
        folder.mkdir()
        (folder / "digits.txt").write_text("a handwritten seven\ntwo\n")
        self.folder, self.arguments, self.moments = folder, arguments, []

    def once(self, *, seconds=None, dying_in=None):
        """Whether the command came to its end. It is killed after `seconds`, or two checkpoints if these come first."""
        end, before = time.monotonic() + (seconds or 0), self._checkpoints()

        def is_over():
            return time.monotonic() > end or len(self._checkpoints() - before) >= 2

        begun = (self.folder / "run" / "run.yaml").exists()
        again = ["--resume"] if begun else []
        code = run(train, self.folder, [*self.arguments, *again], dying_in, until=is_over if seconds else None)
        if code == -signal.SIGKILL:
            self.moments.append("any" if dying_in is None else "save")
        else:
            assert code == 0, (self.folder / "output.txt").read_text()
        return code == 0

    def _checkpoints(self):
        return set(self.folder.glob("run/*/step-*"))


def assert_same_run(killed, whole):
    """Networks, average, optimisers, counters, generators, student and log."""
    for stage in [path.name for path in (whole / "run").iterdir() if any(path.glob("step-*"))]:
        step, state = checkpoint.load_newest(killed / "run" / stage)
        whole_step, expected = checkpoint.load_newest(whole / "run" / stage)
        assert step == whole_step
        for each in (state, expected):
            each["counters"].pop("seconds")
        assert_same(state, expected, stage)
        names = [sorted(path.name for path in (each / "run" / stage).iterdir()) for each in (killed, whole)]
        assert names[0] == names[1]
    weights = "student/unet/diffusion_pytorch_model.safetensors"
    assert_same(load_file(killed / weights), load_file(whole / weights), "student")
    facts, expected = (json.loads((each / "student" / "fastdistill.json").read_text()) for each in (killed, whole))
    for each in (facts, expected):
        each["training"].pop("seconds")
    assert facts == expected
    assert log_of(killed) == log_of(whole)
    assert [path.name for path in killed.glob("*") if path.name.startswith(".")] == []
    assert [path.name for path in (killed / "seen").rglob(".*")] == []
    for picture in (whole / "seen" / "pictures").iterdir():
        assert (killed / "seen" / "pictures" / picture.name).read_bytes() == picture.read_bytes()
    assert (killed / "seen" / "report.html").read_text().rstrip().endswith("</html>")


def assert_same(a, b, place):
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, place
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for index, (mine, its) in enumerate(zip(a, b)):
            assert_same(mine, its, f"{place}.{index}")
    else:
        assert a == b, place


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "seen" / "log.jsonl").read_text().splitlines()]
    for line in lines:
        for of_the_process in ("seconds", "time", "peak_bytes"):
            line.pop(of_the_process)
    return lines


@pytest.fixture
def whole(request, tmp_path):
    uninterrupted = Killed(tmp_path / "whole", request.param)
    assert uninterrupted.once()
    return uninterrupted


@pytest.mark.long
@pytest.mark.parametrize(
    ("whole", "kills"),
    [
        ([*DMD, "--updates=40"], 20),
        ([*INSTAFLOW, "--updates=12", "--set=reflow.trainer.updates=12", "--set=reflow.trainer.batch_size=4"], 10),
    ],
    ids=["dmd", "instaflow"],
    indirect=["whole"],
)
def test_a_run_on_the_digits_killed_at_random_moments_ends_in_the_same_bits(whole, kills, tmp_path):
    """Every second kill is at a system call of a checkpoint's writing, the others at any time from the start on."""
    start = time.monotonic()
    Killed(tmp_path / "timed", whole.arguments).once(dying_in=(0, 0))
    to_the_first_checkpoint = time.monotonic() - start
    killed, moments = Killed(tmp_path / "killed", whole.arguments), random.Random(0)
    while len(killed.moments) < kills:
        if len(killed.moments) % 2:
            moment = {"dying_in": (moments.randrange(2), moments.randrange(45))}
        else:
            moment = {"seconds": moments.uniform(0, 1.2 * to_the_first_checkpoint)}
        print(f"kill {len(killed.moments) + 1}: {moment}", flush=True)
        assert not killed.once(**moment)
    assert killed.once()
    assert killed.moments.count("save") == kills // 2
    assert_same_run(killed.folder, whole.folder)


@pytest.mark.parametrize("whole", [[*DMD, "--updates=3"]], ids=["dmd"], indirect=True)
def test_a_run_killed_in_each_of_its_checkpoints_ends_in_the_same_bits(whole, tmp_path):
    killed = Killed(tmp_path / "killed", whole.arguments)
    for moment in ((0, 4), (1, 12), (0, 23)):
        assert not killed.once(dying_in=moment)
    assert killed.once()
    assert killed.moments == ["save"] * 3
    assert_same_run(killed.folder, whole.folder)
