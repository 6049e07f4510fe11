"""`fastdistill models`: every name with its sizes, for people and for programs."""

import json

import pytest
from typer.testing import CliRunner

from fastdistill.cli import app
from fastdistill.models import ARCHITECTURES, bundled_models, listing


@pytest.fixture(scope="module")
def rows():
    return listing.collect()


@pytest.fixture
def run(rows, monkeypatch):
    monkeypatch.setattr(listing, "collect", lambda: rows)
    return lambda *options: CliRunner().invoke(app, ["models", *options]).stdout


def test_the_table_holds_every_name_in_one_line_each(run):
    lines = run().splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*ARCHITECTURES, *bundled_models()]
    (sdxl,) = (line for line in lines if line.split()[0] == "sdxl")
    sizes = ("2,567,463,684", "83,653,863", "123,060,480", "694,659,840")
    for fact in ("random", "1024 x 1024", "epsilon", "EulerDiscrete", *sizes):
        assert fact in sdxl


def test_json_holds_the_same(run):
    (teacher,) = (row for row in json.loads(run("--json")) if row["name"] == "digits-teacher")
    assert teacher["weights"] == "trained"
    assert teacher["resolution"] == [32, 32]
    assert sum(teacher["parameters"].values()) == pytest.approx(1.7e6, rel=0.01)
