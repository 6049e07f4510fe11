"""`pytest bench/`: the cases as a pytest-benchmark suite, for its comparison and storage (docs/benchmarks.md)."""

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("fastdistill.bench")
    group.addoption("--all-cases", action="store_true", help="every case, dtype, layout and mode (hours)")


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError('this suite needs pytest-benchmark: pip install "fastdistill[bench]"')
