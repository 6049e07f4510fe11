"""`pytest bench/` works from a clone, and `pytest` alone leaves it out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiler  # it stands in the sources
ROOT = Path(__file__).resolve().parent.parent.parent


def run_pytest(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    # Beside other workers pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_one_case_is_measured_beside_its_baseline(tmp_path):
    saved = tmp_path / "saved.json"
    done = run_pytest(
        "bench/",
        "-k",
        "geglu and forward and float32 and 64x10240",
        f"--benchmark-json={saved}",
        "--benchmark-min-rounds=2",
        "--benchmark-max-time=0.01",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert "geglu-cpu-forward-float32-contiguous-64x10240-cpu" in saved.read_text()


def test_pytest_alone_collects_none_of_it(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
