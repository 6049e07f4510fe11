"""The table of figures: confidence, Markdown, and its place in a file."""

import pytest

from fastdistill.models.digits.figures import BEGIN, END, as_markdown, interval, write_between_marks
from fastdistill.models.digits.metrics import DigitScores

SCORES = [DigitScores(fd, 0.9, 1.0, (0.9,) * 10, (1.0,) * 10) for fd in (0.2, 0.3, 0.4)]


def test_the_interval_is_students_t():
    # deviation 0.1, 3 values: 4.303 * 0.1 / sqrt(3) = 0.248
    assert interval([0.2, 0.3, 0.4]) == "0.300 ± 0.248"
    assert interval([0.25]) == "0.250"


def test_the_table_names_rows_and_seeds():
    table = as_markdown([("teacher, 50 steps", SCORES), ("real", SCORES[:1])], (4, 5, 6))
    assert "seeds 4, 5, 6" in table
    assert "| teacher, 50 steps | 0.300 ± 0.248 | 0.900 ± 0.000 | 1.000 ± 0.000 |" in table
    assert "| real | 0.200 | 0.900 | 1.000 |" in table
    assert table.count("| real | " + " | ".join(["0.90"] * 10)) == 1


def test_figures_replace_what_stands_between_the_marks(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_between_marks(file, "new")
    assert file.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    write_between_marks(file, "newer")
    assert file.read_text() == f"before\n{BEGIN}\nnewer\n{END}\nafter\n"


@pytest.mark.parametrize("content", ["nothing", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {END} {BEGIN}"])
def test_a_file_without_its_marks_is_left_alone(tmp_path, content):
    file = tmp_path / "page.md"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"page\.md"):
        write_between_marks(file, "new")
    assert file.read_text() == content
