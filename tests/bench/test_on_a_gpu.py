"""What the thin layer between the benchmarks and torch.cuda must do on a real device."""

import pytest
import torch
from fastdistill.bench import rows
from fastdistill.bench.cli import app
from fastdistill.bench.gpu import Gpu
from fastdistill.bench.gpu_timing import time_replays
from fastdistill.bench.measure import measured
from typer.testing import CliRunner

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu():
    return Gpu()


def test_a_recording_counts_its_kernels_and_repeats_them(gpu):
    value = torch.zeros(1000, device=gpu.device)
    with gpu.stream():
        value.add_(1)
        recording = gpu.record(lambda: [value.add_(1) for _ in range(5)])
        recording.replay()
    gpu.synchronize()
    assert recording.nodes == 5
    assert (value == 6).all()


def test_a_call_of_one_kernel_is_one_launch(gpu):
    x = torch.randn(1 << 20, device=gpu.device)
    timed = time_replays(gpu, lambda: [x.clone] * 3, lambda: [x.clone], replays=5)
    assert (timed.how, timed.launches) == ("graph", 1)
    assert len(timed.times.ours) == 5
    assert min(*timed.times.ours, *timed.times.baseline) > 0


def test_work_that_cannot_be_recorded_is_timed_with_events(gpu):
    x = torch.randn(1000, device=gpu.device)
    timed = time_replays(gpu, lambda: [lambda: x.sum().item()], lambda: [x.clone], replays=3)
    assert timed.how == "events"
    assert timed.note.startswith("not recorded in a graph:")
    x.clone()  # and the device still works
    gpu.synchronize()


def test_the_peak_is_that_of_temporaries_and_results(gpu):
    x = torch.randn(1 << 20, device=gpu.device)
    assert gpu.peak_bytes(lambda: (x + 1) * 2) == 2 * x.nbytes


def test_the_devices_limits_are_measured():
    found = measured("cuda", 1)
    assert set(found.matmul_tflop_s) == {"bfloat16", "float16", "float32"}
    assert found.launch_us > 0
    assert found.l2_bytes == Gpu().l2_bytes


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        ("group_norm_silu", "1280x8x8"),
        ("layer_norm", "64x1280"),
        ("geglu", "64x10240"),
        ("attention", "8x64x77x160"),
        ("weighted_squared_error", "8x4x64x64"),
        ("dmd_gradient", "1x4x64x64"),
    ],
)
def test_every_op_is_recorded_cold_and_hot_and_called_eagerly(tmp_path, op, shape, mode):
    options = ["--device", "cuda", "--shapes", shape, "--dtype", "bfloat16", "--mode", mode, "--pairs", "5"]
    result = CliRunner().invoke(app, [op, *options, "--providers", "cuda,triton,torch", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = [row for row, _ in rows.read_jsonl(tmp_path / rows.RESULTS)]
    for row in found:
        assert row.status == "ok", row
        assert row.speed.how == ("events" if row.key.cache == "eager" else "graph")
        assert "not" not in row.note
        assert row.usage.peak_bytes > 0
        assert row.key.cache == "eager" or row.usage.launches >= 1
    assert {row.key.cache for row in found} == {"cold", "hot", "eager"}
