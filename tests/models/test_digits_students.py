"""Students of several training seeds, side by side."""

import pytest

from fastdistill.models.digits.students import Student, as_markdown, measure_students


def student(method, seed, fd):
    return Student(method, seed, fd, 0.9, 0.8, 0.7 + 0.01 * seed, {"updates": {"student": 5, "fake_score": 10}})


def test_runs_are_grouped_by_method_with_the_interval_over_training_seeds():
    table = as_markdown([student("dmd", 1, 0.3), student("add", 0, 0.7), student("dmd", 0, 0.2)], (4, 5))
    lines = table.splitlines()[4:]
    assert "noise seeds 4, 5" in table
    assert lines[0] == "| dmd | 0 | 5 of student, 10 of fake_score | 0.200 | 0.900 | 0.800 | 0.70 |"
    assert lines[1].startswith("| dmd | 1 |")
    # Two values 0.1 apart: deviation 0.0707, 12.706 * 0.0707 / sqrt(2) = 0.635.
    assert lines[2] == "| **dmd** | **2 seeds** | | 0.250 ± 0.635 | 0.900 ± 0.000 | 0.800 ± 0.000 | 0.70 |"
    assert lines[3].startswith("| add | 0 |")
    assert len(lines) == 4


def test_a_folder_without_a_students_facts_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"needed a student that was trained here, with fastdistill\.json"):
        measure_students([tmp_path], [0])
