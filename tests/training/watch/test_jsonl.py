"""The log: a line per report that any JSON reader takes, continued exactly where a killed run left it."""

import json
import math
import multiprocessing
import os
import resource
import signal

import pytest
from fastdistill.training import RoleConfig, Trainer, TrainerConfig
from fastdistill.training.watch import Log, record, watch
from fastdistill.training.watch.record import figure

from ..test_trainer import CONDITIONS, Pursuit
from .toys import a_report

ADAM = RoleConfig(learning_rate=0.01, warm_up=2, decay=0.5)
TIMED = ("seconds", "time", "peak_bytes")


def lines(path):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def untimed(records):
    return [{name: value for name, value in line.items() if name not in TIMED} for line in records]


def train(folder, checkpoints, killed_after=None, resume=False):
    from fastdistill.training import PromptData

    method = Pursuit()
    config = TrainerConfig(updates=12, batch_size=8, report_every=1, checkpoint_every=5)
    roles = {turn.role: ADAM for turn in method.turns}
    trainer = Trainer(method, PromptData(CONDITIONS, (2,)), config, roles, folder=checkpoints)
    if resume:
        trainer.resume()
    with watch(folder, resume=resume, picture_every=100) as seen:

        def callback(progress):
            seen(progress)
            if progress.update == killed_after:
                os.kill(os.getpid(), signal.SIGKILL)

        callback.begin, callback.end = seen.begin, seen.end
        return trainer.run(callback)


def test_a_run_killed_and_resumed_has_the_log_of_the_uninterrupted_one(tmp_path, few_curves):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, tmp_path / "a")
    child = multiprocessing.get_context("fork").Process(target=train, args=(broken, tmp_path / "b", 8))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [line["update"] for line in lines(broken / "log.jsonl")] == list(range(1, 9))
    with (broken / "log.jsonl").open("a") as file:
        file.write('{"stage": "pursuit", "upda' + 10_000 * "x")  # killed while it wrote
    train(broken, tmp_path / "b", resume=True)
    assert untimed(lines(broken / "log.jsonl")) == untimed(lines(whole / "log.jsonl"))
    assert [line["update"] for line in lines(broken / "log.jsonl")] == list(range(1, 13))


def test_taking_a_stage_up_again_leaves_other_stages_alone(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    for stage, update in (("reflow", 50), ("reflow", 100), ("distillation", 10), ("distillation", 20)):
        log.write(record(a_report(update, stage)))
    again = Log(tmp_path / "log.jsonl")
    again.begin("reflow", 100)
    again.begin("distillation", 10)
    kept = [("reflow", 50), ("reflow", 100), ("distillation", 10)]
    assert [(line["stage"], line["update"]) for line in lines(again.path)] == kept
    assert [(line["stage"], line["update"]) for line in again.records] == kept


def test_a_figure_that_is_not_finite_is_null_with_a_flag_and_comes_back(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.write(record(a_report(3, losses={"dmd": math.nan, "reg": -math.inf, "good": 0.25})))
    (line,) = lines(log.path)
    assert line["losses"] == {"dmd": None, "reg": None, "good": 0.25}
    assert line["not_finite"] == {"losses.dmd": "nan", "losses.reg": "-inf"}
    assert math.isnan(figure(line, "losses", "dmd"))
    assert figure(line, "losses", "reg") == -math.inf
    assert figure(line, "losses", "good") == 0.25


def test_what_a_full_disk_refused_is_written_as_soon_as_there_is_room(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.write(record(a_report(1)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 20, before[1]))
        with pytest.raises(OSError, match="large"):
            log.write(record(a_report(2)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.write(record(a_report(3)))
    assert [line["update"] for line in lines(log.path)] == [1, 2, 3]


def test_a_file_that_is_no_log_is_refused_by_its_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"stage": "dmd", "update": 1}\n[1, 2]\n')
    with pytest.raises(ValueError, match=r"log\.jsonl: line 2 is no record"):
        Log(path)
