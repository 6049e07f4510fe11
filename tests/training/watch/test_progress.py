"""The display: its figures, in a terminal and in a file."""

import io

import pytest
from fastdistill.training.watch import Display
from fastdistill.training.watch.progress import Rate, duration, figures, number, size, speed
from rich.console import Console

from .toys import a_report


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def display(terminal, seconds=30.0):
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=160, color_system=None)
    return Display(console, seconds=seconds, clock=clock), clock, file


def test_rate_and_time_left_are_of_the_last_reports():
    clock = Clock()
    rate = Rate(clock)
    assert rate.per_second is None
    assert rate.left(10) is None
    for update in range(0, 100, 2):  # 2 updates a second, then one in four seconds
        rate.add(update)
        clock.now += 1.0 if update < 40 else 8.0
    assert rate.per_second == pytest.approx(0.25)
    assert rate.left(10) == pytest.approx(40)


def test_every_figure_of_a_report_is_shown():
    clock = Clock()
    rate = Rate(clock)
    rate.add(30)
    clock.now += 20
    rate.add(40)
    report = a_report(
        40,
        losses={"dmd": 0.12345, "regression": 12345.6},
        learning_rates={"student": 2e-5, "fake_score": 4e-4},
        skipped={"student": 0, "fake_score": 3},
        validation={"fd": 0.4567, "accuracy": 0.98},
        validated=35,
        best=20,
        peak_bytes=1_240_000_000,
    )
    assert figures(report, rate) == {
        "updates": "40/100",
        "speed": "0.50 updates/s",
        "time left": "2 min 00 s",
        "losses": "dmd 0.123, regression 1.23e+04",
        "learning rates": "student 2.00e-05, fake_score 4.00e-04",
        "gradient norms": "student 0.5",
        "skipped": "fake_score 3",
        "validation": "fd 0.457, accuracy 0.98 (update 35, best at 20)",
        "peak memory": "1.24 GB of the device",
    }


def test_memory_of_a_cpu_is_the_high_water_mark_of_the_process():
    shown = figures(a_report(40), Rate(Clock()))["peak memory"]
    assert shown.endswith("of the process")
    assert shown[0].isdigit()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (duration(34.4), "34 s"),
        (duration(307), "5 min 07 s"),
        (duration(3 * 3600 + 300), "3 h 05 min"),
        (duration(52 * 3600), "2 d 04 h"),
        (speed(0.02), "50.0 s per update"),
        (speed(None), "? updates/s"),
        (size(812e6), "812 MB"),
        (number(0), "0"),
        (number(1.23456), "1.23"),
    ],
)
def test_figures_are_short(shown, expected):
    assert shown == expected


def test_a_file_gets_a_line_now_and_then_and_one_for_the_last_report():
    shown, clock, file = display(terminal=False)
    with shown:
        shown.begin(a_report(0))
        for update in range(10, 101, 10):
            clock.now += 12
            shown(a_report(update))
    lines = file.getvalue().splitlines()
    assert lines[0] == "reflow: from update 0 to 100"
    assert [line.split()[2] for line in lines[1:]] == ["10/100", "40/100", "70/100", "100/100"]
    assert "\x1b" not in file.getvalue()


def test_a_terminal_shows_bars_of_several_stages_and_the_figures_of_the_last():
    shown, clock, file = display(terminal=True)
    with shown:
        for stage in ("reflow", "distillation"):
            shown.begin(a_report(0, stage))
            for update in (50, 100) if stage == "reflow" else (20, 40):
                clock.now += 10
                shown(a_report(update, stage, skipped={"student": 2}))
        shown.say("no room for a picture")
        file.truncate(0)
        shown._live.refresh()
        screen = file.getvalue()
    assert "reflow" in screen
    assert "100/100" in screen
    assert "distillation" in screen
    assert "40/100 · 2.00 updates/s · 30 s left" in screen
    assert "flow 0.025" in screen
    assert "student 2" in screen


def test_a_run_that_never_began_leaves_nothing_behind():
    shown, _, file = display(terminal=True)
    with shown:
        pass
    assert "100/100" not in file.getvalue()
    assert shown._bars.tasks == []
