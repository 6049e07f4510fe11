import pytest

from fastdistill import _native


@pytest.fixture(scope="session", autouse=True)
def libraries():
    """Loaded before the first test: raw ops have no kernel until then, and a test may be run alone."""
    return _native.cpu_library(), _native.cuda_library()
