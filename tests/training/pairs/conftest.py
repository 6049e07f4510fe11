"""A tiny teacher, and a small set of its pairs."""

import pytest
from fastdistill.training import Teacher
from fastdistill.training.pairs import Source, generate

from ..toys import tiny_pipeline

PROMPTS = ("a handwritten seven", "two", "digit 3")


@pytest.fixture(scope="session")
def teacher():
    return Teacher(tiny_pipeline())


@pytest.fixture(scope="session")
def source(teacher):
    return Source.of(teacher, PROMPTS)


@pytest.fixture
def small(source):
    """10 pairs in shards of 4, in two steps."""
    return source.pair_set(count=10, shard_size=4, steps=2, solver="heun", guidance_scale=1.5, seed=3)


@pytest.fixture
def made(source, small, tmp_path):
    """The folder of that set, whole."""
    generate(source, small, tmp_path / "set", batch_size=3)
    return tmp_path / "set"
