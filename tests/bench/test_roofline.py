"""Limits, devices by figures, and predictions from them."""

import json

import pytest
import torch
from fastdistill.bench.benchmark import OPS, load
from fastdistill.bench.cli import app
from fastdistill.bench.devices import DeviceSpec, UnknownDevice, find
from fastdistill.bench.measure import measured
from fastdistill.bench.roofline import Cost, limit, pointwise
from typer.testing import CliRunner

DEVICE = DeviceSpec("a device", copy_gb_s=1000, matmul_tflop_s={"bfloat16": 100, "float32": 10})


def test_the_slower_of_memory_and_arithmetic_is_the_limit():
    memory = limit(Cost(bytes=2_000_000, flops=10**6), torch.bfloat16, DEVICE)
    assert (memory.us, memory.bound) == (pytest.approx(2.0), "memory")
    arithmetic = limit(Cost(bytes=1000, flops=5 * 10**8), torch.bfloat16, DEVICE)
    assert (arithmetic.us, arithmetic.bound) == (pytest.approx(5.0), "arithmetic")
    assert limit(Cost(1000, 5 * 10**8), torch.float32, DEVICE).us == pytest.approx(50)


def test_what_a_call_reaches_follows_from_its_time():
    found = limit(Cost(bytes=2_000_000, flops=8_000_000), torch.bfloat16, DEVICE)
    assert found.percent(4.0) == pytest.approx(50)
    assert found.gigabytes_per_second(4.0) == pytest.approx(500)
    assert found.teraflops(4.0) == pytest.approx(2)


def test_a_dtype_without_a_figure_gets_the_fastest_one_so_that_a_limit_stays_a_limit():
    assert DEVICE.rate(torch.float16) == 100


def test_full_costs_what_forward_and_backward_do():
    values, flops = {"forward": 10, "backward": 20}, {"forward": 3, "backward": 4}
    assert pointwise("full", torch.bfloat16, values, flops) == Cost(60, 7)
    assert pointwise("backward", torch.float32, values, flops) == Cost(80, 4)


def test_a_device_is_read_from_a_json_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"copy_gb_s": 1555, "matmul_tflop_s": {"bfloat16": 250}, "launch_us": 1.5}))
    assert find(str(path)) == DeviceSpec("mine", 1555, {"bfloat16": 250}, launch_us=1.5, source=str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"copy_gb_s": 1}', "must hold an object with copy_gb_s and matmul_tflop_s"),
        ("[]", "must hold an object"),
        ("{", "is not JSON"),
        ('{"copy_gb_s": 0, "matmul_tflop_s": {"bfloat16": 1}}', "copy_gb_s must be a number above 0; got 0"),
        ('{"copy_gb_s": 1, "matmul_tflop_s": {}}', "needs the rate of at least one dtype"),
        ('{"copy_gb_s": 1, "matmul_tflop_s": {"bfloat16": "fast"}}', "matmul_tflop_s bfloat16 must be a number"),
        ('{"copy_gb_s": 1, "matmul_tflop_s": {"bfloat16": 1}, "speed": 3}', "unknown 'speed'; known: name, copy_gb_s"),
    ],
)
def test_a_file_that_describes_no_device_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UnknownDevice, match=message):
        find(str(path))


def test_an_unknown_device_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(UnknownDevice, match=r"'h300'; known: h200, or a \.json file"):
        find("h300")
    with pytest.raises(UnknownDevice, match="No such file"):
        find(str(tmp_path / "nowhere.json"))


def predictions(*arguments):
    result = CliRunner().invoke(app, ["--device-spec", "h200", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_predictions_cover_every_site_of_every_op_and_say_what_they_are():
    text = predictions("--mode", "all", "--dtype", "bfloat16")
    assert text.startswith("PREDICTED, not measured: NVIDIA H200, copy 4300 GB/s, matmul 790 TFLOP/s in bfloat16")
    lines = [line.split() for line in text.splitlines()]
    found = {tuple(line[:4]) for line in lines if len(line) > 8 and line[0] in OPS}
    assert found == {
        (op, mode, "bfloat16", case.name)
        for op in OPS
        for mode in ("forward", "backward", "full")
        for case in load(op).cases
    }


def test_a_prediction_is_bytes_over_bandwidth():
    (line,) = [
        line
        for line in predictions("group_norm_silu", "--shapes", "320x64x64", "--dtype", "bfloat16").split("\n")
        if "320x64x64" in line
    ]
    size = 2 * (2 * 320 * 64 * 64 + 2 * 320)
    assert line.split()[4:] == ["sd15,sdxl", f"{size / 1e6:.2f}", "15.7", f"{size / 4300e9 * 1e6:.2f}", "memory"]


def test_this_machines_own_limits_are_measured_once(monkeypatch):
    monkeypatch.setattr("fastdistill.bench.measure._COPY_BYTES", {"cpu": 1 << 22})
    monkeypatch.setattr("fastdistill.bench.measure._MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr("fastdistill.bench.environment.last_level_cache_bytes", lambda: 1 << 20)
    measured.cache_clear()
    found = measured("cpu", 1)
    assert 0.1 < found.copy_gb_s < 10_000
    assert set(found.matmul_tflop_s) == {"float32", "bfloat16"}
    assert found.source == "measured"
    assert measured("cpu", 1) is found
    measured.cache_clear()
