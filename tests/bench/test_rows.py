"""Rows, their file, and their table."""

import io
import json

import pytest
from fastdistill.bench.accuracy import Accuracy
from fastdistill.bench.report import missing, print_report, summary
from fastdistill.bench.roofline import Limit
from fastdistill.bench.rows import RESULTS, Key, Row, read_jsonl, write_jsonl
from fastdistill.bench.timing import Speed
from fastdistill.bench.usage import Usage
from rich.console import Console

ENVIRONMENT = {
    "cpu": "A processor",
    "threads": 2,
    "fastdistill": "0.1",
    "capability": "avx2",
    "commit": None,
    "torch": "2.13",
    "torch_capability": "AVX2",
    "python": "3.10",
}


def key(case="320x64x64", dtype="float32", provider="cpu"):
    return Key("group_norm_silu", case, "forward", dtype, "channels_last", "hot", "cpu", provider)


def measured(ratio, error=1e-7, **changes):
    speed = Speed(100.0, 100.0 * ratio, ratio, ratio - 0.125, ratio + 0.125, 30, 90.0, 120.0)
    limit = Limit(bytes=5_000_000, flops=10, us=20.0, bound="memory")
    accuracy = Accuracy("y", error, 2e-7, 4e-6)
    return Row(key(**changes), "torch", speed, accuracy, limit=limit, usage=Usage(2 << 20, 3))


ABSENT = Row(key(provider="triton"), "torch", missing="needs a CUDA tensor")


def text_of(rows, width=40):
    out = io.StringIO()
    print_report(rows, ENVIRONMENT, Console(file=out, width=width))
    return out.getvalue()


def test_a_speed_without_its_error_is_refused():
    with pytest.raises(ValueError, match="a speed and an accuracy"):
        Row(key(), "torch", measured(1.5).speed)


def test_a_row_that_was_not_measured_needs_a_reason():
    with pytest.raises(ValueError, match="or the reason"):
        Row(key(), "torch")


@pytest.mark.parametrize(
    ("row", "status"), [(measured(1.5), "ok"), (measured(1.5, error=5e-6), "failed"), (ABSENT, "missing")]
)
def test_status(row, status):
    assert row.status == status


def test_rows_are_read_back_as_they_were_written(tmp_path):
    rows = [measured(1.5), measured(0.5, error=5e-6, dtype="bfloat16"), ABSENT]
    path = write_jsonl(rows, ENVIRONMENT, tmp_path)
    assert read_jsonl(path) == [(row, ENVIRONMENT) for row in rows]
    assert [file.name for file in tmp_path.iterdir()] == [RESULTS]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["status"] for record in records if "status" in record] == ["ok", "failed", "missing"]
    assert sum("id" in record for record in records) == 1  # the environment stands in the file once


def test_a_row_replaces_that_of_the_same_key_and_leaves_the_others(tmp_path):
    write_jsonl([measured(1.5), measured(2.0, case="128x512x512")], ENVIRONMENT, tmp_path)
    later = {**ENVIRONMENT, "torch": "2.14"}
    path = write_jsonl([measured(3.0, case="128x512x512"), ABSENT], later, tmp_path)
    assert read_jsonl(path) == [
        (measured(1.5), ENVIRONMENT),
        (measured(3.0, case="128x512x512"), later),
        (ABSENT, later),
    ]


def test_a_file_that_holds_no_rows_is_refused_by_name_and_line(tmp_path):
    path = write_jsonl([measured(1.5)], ENVIRONMENT, tmp_path)
    path.write_text(path.read_text() + '{"rows": 3}\n')
    with pytest.raises(ValueError, match=r"results\.jsonl: line 3 is no row of a benchmark"):
        read_jsonl(path)


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = write_jsonl([measured(1.5)], ENVIRONMENT, tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_jsonl([measured(2.5)], {"torch": object()}, tmp_path)
    assert read_jsonl(path) == [(measured(1.5), ENVIRONMENT)]


def test_the_table_is_whole_on_a_narrow_console():
    lines = text_of([measured(1.5), measured(2.0, case="128x512x512", dtype="bfloat16")], width=40).splitlines()
    (line,) = [line for line in lines if "128x512x512" in line and "channels_last" in line and "median" not in line]
    assert line.split()[:7] == ["group_norm_silu", "forward", "bfloat16", "channels_last", "hot", "cpu", "128x512x512"]
    assert line.split()[7:12] == ["100.0", "200.0", "2.00x", "1.88", "2.12"]
    assert line.split()[12:16] == ["50GB/s", "20%", "2.00", "3"]
    assert line.split()[16:] == ["y", "1.0e-07", "2.0e-07", "4.0e-06", "ok"]
    assert not any("…" in line for line in lines)


def test_a_failed_row_says_so_in_the_table_and_in_the_summary():
    text = text_of([measured(1.5), measured(2.0, error=5e-6, case="128x512x512")])
    assert "FAILED" in text.splitlines()[4]
    assert "1 FAILED: 128x512x512" in text


def test_the_summary_gives_median_and_worst_row_per_group():
    rows = [measured(ratio, case=f"{i}x8x8") for i, ratio in enumerate((1.5, 0.75, 2.0))]
    assert summary([*rows, measured(3.0, dtype="bfloat16")]) == [
        "group_norm_silu forward float32 channels_last hot cpu: median 1.50x over 3 shapes, worst 0.75x (1x8x8)",
        "group_norm_silu forward bfloat16 channels_last hot cpu: median 3.00x over 1 shape, worst 3.00x (320x64x64)",
    ]


def test_a_provider_that_raised_is_told_apart_from_one_that_is_not_here():
    raised = Row(key(provider="cuda"), "torch", missing="raised RuntimeError: bad", raised=True)
    assert (raised.status, ABSENT.status) == ("raised", "missing")
    assert "group_norm_silu cuda: not measured in 1 row: raised RuntimeError: bad" in text_of([raised])


def test_what_was_not_measured_is_one_line_per_provider_and_reason():
    rows = [ABSENT, measured(1.5), ABSENT]
    assert missing(rows) == ["group_norm_silu triton: not measured in 2 rows: needs a CUDA tensor"]
    assert missing(rows)[0] in text_of(rows)
