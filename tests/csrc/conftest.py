import pytest

from tests.csrc.emulator import Emulator, build


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """The CUDA kernels, on the host."""
    return Emulator(build(tmp_path_factory.mktemp("emulator")))
