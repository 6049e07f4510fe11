"""`make gpu-check`, as far as it goes without a GPU: what it reads, what it writes, that it goes on."""

import importlib.util
import sys
import tarfile
from pathlib import Path

import pytest

from .test_rows import ENVIRONMENT, measured

pytestmark = pytest.mark.compiler  # it works on the sources
SCRIPT = Path(__file__).resolve().parent.parent.parent / ".ci" / "gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch):
    specification = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def imitated(gpu_check, monkeypatch):
    """Every step leaves a log; building fails."""
    monkeypatch.setattr(gpu_check, "_sees_a_gpu", lambda: True)
    monkeypatch.setattr(gpu_check, "VERSIONS", "print('torch 2.11')")

    def step(name, failed=False):
        def run(logs, limit, *more):
            (logs / f"{name}.log").write_text(f"{name} within {limit:.0f} s")
            return gpu_check.Step(name, failed, 1.0, [f"{name} ran"])

        return run

    def bench(logs, limit, place):
        from fastdistill.bench.rows import write_jsonl

        write_jsonl([measured(1.5, provider="cuda"), measured(0.5, provider="triton")], ENVIRONMENT, place)
        (place / "roofline.png").write_bytes(b"picture")
        return step("bench")(logs, limit)

    monkeypatch.setattr(gpu_check, "build", step("build", failed=True))
    monkeypatch.setattr(gpu_check, "test", step("test"))
    monkeypatch.setattr(gpu_check, "sanitize", step("sanitize"))
    monkeypatch.setattr(gpu_check, "bench", bench)
    return gpu_check


def test_a_failed_step_stops_no_other_and_is_the_exit_code(imitated, tmp_path):
    assert imitated.main(["--out", str(tmp_path), "--test-seconds", "77"]) == 1
    summary = (tmp_path / "summary.md").read_text()
    assert [line for line in summary.splitlines() if line.startswith("## ")] == [
        "## build: FAILED (1 s)",
        "## test: passed (1 s)",
        "## sanitize: passed (1 s)",
        "## bench: passed (1 s)",
        "## Figures",
    ]
    assert summary.splitlines()[2] == "torch 2.11"
    assert "| group_norm_silu | forward | float32 | channels_last | hot | cuda | 1 | 1.50x | 1.50x | 20 % |" in summary
    worst = [line for line in summary.splitlines() if line.startswith("- group_norm_silu")]
    assert worst[0] == "- group_norm_silu forward float32 channels_last hot triton 320x64x64: 0.50x, 100.0 us"


def test_it_leaves_four_files(imitated, tmp_path):
    imitated.main(["--out", str(tmp_path / "new" / "folder"), "--test-seconds", "77"])
    out = tmp_path / "new" / "folder"
    assert sorted(file.name for file in out.iterdir()) == ["logs.tar", "plots.tar", "results.jsonl", "summary.md"]
    with tarfile.open(out / "logs.tar") as archive:
        assert archive.extractfile("test.log").read() == b"test within 77 s"
    with tarfile.open(out / "plots.tar") as archive:
        assert archive.getnames() == ["roofline.png"]


def test_steps_can_be_chosen(imitated, tmp_path):
    assert imitated.main(["--out", str(tmp_path), "--steps", "test,sanitize"]) == 0
    assert "build" not in (tmp_path / "summary.md").read_text()
    with pytest.raises(SystemExit):
        imitated.main(["--steps", "tests"])


def test_without_a_gpu_it_refuses_and_names_the_dry_run(gpu_check, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "_sees_a_gpu", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "DRY_RUN=1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_outcomes_are_read_from_either_kind_of_log(gpu_check):
    log = """
tests/ops/test_a.py::test_x[cuda-1 2] PASSED                     [  5%]
tests/ops/test_a.py::test_y FAILED                               [ 10%]
tests/ops/test_a.py::test_z SKIPPED (needs an NVIDIA GPU)        [ 15%]
[gw1] [ 20%] ERROR tests/ops/test_b.py::test_x[a b]
FAILED tests/ops/test_a.py::test_y - RuntimeError
"""
    assert gpu_check.outcomes(log) == {
        "tests/ops/test_a.py::test_x[cuda-1 2]": "PASSED",
        "tests/ops/test_a.py::test_y": "FAILED",
        "tests/ops/test_a.py::test_z": "SKIPPED",
        "tests/ops/test_b.py::test_x[a b]": "ERROR",
    }


def test_a_command_past_its_limit_is_killed_and_its_output_kept(gpu_check, tmp_path):
    endless = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]
    ran = gpu_check.execute(endless, tmp_path / "log", 3)
    assert (ran.code, ran.text) == (None, "begun\n")
    assert ran.outcome().startswith("stopped after 3 s")


def test_what_is_sanitized_calls_every_op_in_every_layout_on_odd_sizes_too(gpu_check, tmp_path):
    from fastdistill.bench.benchmark import OPS, load

    on_cpu = gpu_check.KERNELS.replace('"cuda"', '"cpu"').replace('"triton"', '"sdpa"')
    on_cpu = on_cpu.replace("torch.cuda.synchronize()", "pass")
    ran = gpu_check.execute([sys.executable, "-c", on_cpu], tmp_path / "log", 120)
    assert ran.code == 0, ran.text
    calls = [line.split() for line in ran.text.splitlines()]
    for op in map(load, OPS):
        assert {(layout, dtype) for name, _, dtype, layout in calls if name == op.op} == {
            (layout, dtype) for layout in op.layouts for dtype in ("torch.float32", "torch.bfloat16")
        }
        assert {shape for name, shape, _, _ in calls if name == op.op} - {case.name for case in op.cases}
    assert {(bits, dtype) for name, bits, dtype, _ in calls if name == "adamw"} == {
        (bits, dtype) for bits in ("32-bit", "8-bit") for dtype in ("torch.float32", "torch.bfloat16")
    }


def test_the_providers_it_asks_for_exist(gpu_check):
    from fastdistill.bench.benchmark import OPS, load, select_providers

    found = select_providers([load(op) for op in OPS], gpu_check.PROVIDERS.split(","))
    assert all(found)
