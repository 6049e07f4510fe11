"""The comparison with diffusers: what it prints, not how fast anything is."""

import re

import pytest

from fastdistill.engine.compare import Timing, compare, interleave, main, table


def test_the_comparison_names_its_conditions_and_the_error_beside_the_speed(folder):
    text = compare(str(folder), pairs=3, device="cpu", prompt="three")
    header, _, new, cached, accuracy = text.splitlines()
    assert header.startswith(f"{folder}: cpu, ")
    assert "float32, batch 1, 1 step(s)" in header
    assert "3 interleaved pairs per row" in header
    assert new.startswith("new prompt ")
    assert cached.startswith("cached prompt ")
    difference = re.fullmatch(r"largest difference .* over 8 seeds: (\S+); bytes .* differ: (\d+) of 6144", accuracy)
    assert float(difference[1]) < 2e-5
    assert int(difference[2]) < 60


def test_pairs_are_timed_in_turn_and_the_order_changes():
    calls = []
    timing = interleave("row", lambda: calls.append("a"), lambda: calls.append("b"), 4)
    assert "".join(calls[-8:]) == "abbaabba"
    assert len(timing.baseline) == len(timing.ours) == 4


def test_the_ratio_is_that_of_pairs():
    timing = Timing("row", baseline=(1.0, 4.0, 9.0, 4.0, 4.0), ours=(1.0, 2.0, 3.0, 1.0, 8.0))
    assert timing.ratios == [1, 2, 3, 4, 0.5]
    assert table([timing]).splitlines()[1].split() == (
        ["row", "4000.00", "(3400.00-5000.00)", "2000.00", "(1000.00-4000.00)", "2.00", "(0.90-3.20)"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "digits-nobody-made"], "unknown model 'digits-nobody-made'"),
        (["--pairs", "2"], "pairs must be at least 3; got 2"),
        (["--without", "fold_everything"], "unknown pass 'fold_everything'; known: fused_group_norm_silu"),
        (["--steps", "0"], "steps must be an integer of at least 1; got 0"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(capsys, folder, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(["--model", str(folder), "--device", "cpu", *arguments])
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
