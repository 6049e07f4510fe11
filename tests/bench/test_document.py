"""The generated part of docs/benchmarks.md."""

import dataclasses
from pathlib import Path

import pytest
from fastdistill.bench.document import BEGIN, END, PAGE, main, page
from fastdistill.bench.rows import write_jsonl

from .test_rows import ABSENT, ENVIRONMENT, measured

HERE = {**ENVIRONMENT, "device": "A processor", "time": "2026-01-02T03:04:05+00:00"}
TEXT = f"# Prose\n\n{BEGIN}\nold\n{END}\n\nMore prose.\n"


@pytest.fixture
def root(tmp_path):
    """A repository with one results file and a page that is not current."""
    folder = tmp_path / "bench" / "results" / "cpu-a-processor"
    folder.mkdir(parents=True)
    write_jsonl([measured(1.5), measured(0.75, case="1x8x8"), measured(2.0, error=5e-6, case="2x8x8")], HERE, folder)
    write_jsonl([ABSENT], HERE, folder)
    (tmp_path / PAGE).parent.mkdir()
    (tmp_path / PAGE).write_text(TEXT)
    return tmp_path


def test_only_what_stands_between_the_markers_is_replaced(root):
    assert main([], root) == 0
    text = (root / PAGE).read_text()
    assert text.startswith(f"# Prose\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nMore prose.\n")
    assert "\nold\n" not in text


def test_a_line_gives_median_worst_row_share_of_the_limit_and_errors(root):
    main([], root)
    (line,) = [line for line in (root / PAGE).read_text().splitlines() if line.startswith("| group_norm_silu")]
    assert line.split("|")[7:-1] == [" 3 ", " 1.50x ", " 0.75x (1x8x8) ", " 20 % ", " 1 beyond its limit "]


def test_rows_that_lose_and_what_was_not_measured_are_listed(root):
    main([], root)
    text = (root / PAGE).read_text()
    assert "slower than the baseline (1 of 3):" in text
    assert "- group_norm_silu forward float32 channels_last hot cpu 1x8x8: 0.75x" in text
    assert "- group_norm_silu triton: not measured in 1 row: needs a CUDA tensor" in text


def test_a_page_is_current_only_as_long_as_the_results_are_those_it_was_made_from(root, capsys):
    assert main(["--check"], root) == 1
    assert "python -m fastdistill.bench.document" in capsys.readouterr().err
    main([], root)
    assert main(["--check"], root) == 0
    (file,) = root.glob("bench/results/*/results.jsonl")
    write_jsonl([dataclasses.replace(measured(1.25), note="again")], HERE, file.parent)
    assert main(["--check"], root) == 1


def test_a_page_without_markers_is_refused(root, capsys):
    (root / PAGE).write_text("# Prose\n")
    assert main([], root) == 2
    assert "must hold the two markers" in capsys.readouterr().err
    with pytest.raises(ValueError, match="two markers"):
        page("", [])


def test_a_bad_option_is_exit_code_2(root):
    assert main(["--chekc"], root) == 2


@pytest.mark.compiler
def test_the_tables_of_this_repository_are_current():
    root = Path(__file__).resolve().parent.parent.parent
    assert main(["--check"], root) == 0
    assert list(root.glob("bench/results/*/results.jsonl"))
