"""The compiled libraries: what they need, what they are built for, and what building says when something is missing."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from setuptools.errors import SetupError

from fastdistill import _native
from fastdistill.models import bundled_models
from fastdistill.models.clip_tokenizer import CLIP_MERGES

ROOT = Path(__file__).resolve().parent.parent
# What a library may need from outside: torch's stable C functions, C, C++ and the loader.
STABLE_C = re.compile(r"(aoti_torch_|torch_|_ZN?K?S|_ZT|_Zda|_Zdl|_Zna|_Znw|__cxa_|__gxx_|_Unwind_|_ITM_|__gmon)")
SYSTEM_LIBRARIES = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
THREADS_AND_LOADER = {"libdl.so.2", "librt.so.1", "libpthread.so.0"}


def run(*command, **kwargs):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True, **kwargs).stdout


def undefined_symbols(library):
    # "U name@GLIBC_2.34": a version tells where it comes from; torch's functions have none.
    names = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).splitlines()]
    return [name for name in names if "@GLIBC" not in name and "@GCC" not in name and "@CXXABI" not in name]


def needed_libraries(library):
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", library)))


def assert_stable(library, allowed):
    foreign = [name for name in undefined_symbols(library) if not STABLE_C.match(name)]
    assert not foreign
    assert not [name for name in undefined_symbols(library) if "c10" in name or "2at" in name]
    assert needed_libraries(library) <= allowed


def test_cpu_library_uses_the_stable_c_interface_alone():
    library = _native.cpu_library()
    assert not library.problem
    assert_stable(library.path, SYSTEM_LIBRARIES | {"libtorch_cpu.so"})
    assert "libtorch_cpu.so" in needed_libraries(library.path)


def load_setup():
    spec = importlib.util.spec_from_file_location("fastdistill_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder, **environment):
    """`setup.py build` into `folder`, as pip runs it; (completed process, the package folder it made)."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder)]
    environment = {**os.environ, **environment}
    completed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    made = next(iter(Path(folder).glob("lib*/fastdistill")), None)
    return completed, made


ARCHITECTURES = ("8.0", "9.0a", "10.0")


@pytest.fixture(scope="session")
def cuda_build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    listed = ";".join(ARCHITECTURES)
    completed, made = build(folder, FASTDISTILL_CUDA="1", FASTDISTILL_WERROR="1", TORCH_CUDA_ARCH_LIST=listed)
    assert completed.returncode == 0, completed.stderr[-3000:] + completed.stdout[-3000:]
    return folder, made


@pytest.mark.compiler
@pytest.mark.nvcc
def test_cuda_library_compiles_without_warnings_or_spills_for_ampere_hopper_and_blackwell(cuda_build):
    logs = "".join(log.read_text() for log in cuda_build[0].glob("temp*/*.cuda.o.log"))
    reports = re.findall(r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+ bytes stack.*?loads)", logs, re.DOTALL)
    kernels = Counter(architecture for _, architecture, _ in reports)
    assert set(kernels) == {f"sm_{architecture.replace('.', '')}" for architecture in ARCHITECTURES}
    assert len(set(kernels.values())) == 1, "ptxas reports every kernel for each"
    assert [r for r in reports if r[2] != "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"] == []


@pytest.mark.compiler
@pytest.mark.nvcc
def test_cuda_library_uses_the_stable_c_interface_and_is_built_for_what_was_asked(cuda_build):
    library = cuda_build[1] / "_cuda.so"
    assert_stable(library, SYSTEM_LIBRARIES | THREADS_AND_LOADER | {"libtorch_cpu.so", "libtorch_cuda.so"})
    assert "libtorch_cuda.so" in needed_libraries(library), "so that the loader finds the stream function there"
    listing = run(cuobjdump(), "--list-elf", library)
    assert set(re.findall(r"sm_\w+(?=\.cubin)", listing)) == {f"sm_{a.replace('.', '')}" for a in ARCHITECTURES}
    listed = ";".join(ARCHITECTURES)
    assert b"\0" + listed.encode() + b"\0" in library.read_bytes(), "what fastdistill_cuda_architectures() reports"
    assert json.loads((cuda_build[1] / "_build.json").read_text())["cuda_architectures"] == listed


@pytest.mark.compiler
@pytest.mark.nvcc
def test_vectors_of_geglu_move_in_16_byte_accesses_alone(cuda_build):
    # A store that the compiler takes apart costs four times the instructions, and nothing else shows it.
    functions = run(cuobjdump(), "--dump-sass", cuda_build[1] / "_cuda.so").split("Function : ")[1:]
    found = []
    for text in functions:
        name = text.split()[0]
        if "geglu" in name and re.search(r"Li[48]E", name):  # vectors of 4 or 8 elements
            accesses = re.findall(r"\b(?:LDG|STG)\.[\w.]+", text)
            assert len(accesses) in (6, 10), name  # of two rows: 3 or 5 halves
            assert all(".128" in access for access in accesses), (name, accesses)
            found.append(name)
    assert len(found) == 6 * len(ARCHITECTURES), "forward and backward in three dtypes"


def cuobjdump():
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA and loads the library")
def test_cuda_library_is_not_loaded_into_a_torch_without_cuda():
    library = _native.cuda_library()
    assert library.handle is None
    assert "not built" in library.problem or "has no CUDA" in library.problem


@pytest.mark.compiler
def test_without_a_compiler_the_package_installs_without_libraries_and_says_so(tmp_path):
    nothing = tmp_path / "bin"
    nothing.mkdir()
    completed, made = build(tmp_path / "build", PATH=str(nothing), CUDA_HOME="", CXX="", CUDACXX="")
    assert completed.returncode == 0, completed.stderr
    assert "the _cpu library is not built: no C++ compiler" in completed.stderr
    assert not list(made.glob("*.so"))
    assert "no C++ compiler" in json.loads((made / "_build.json").read_text())["cpu"]
    assert (made / "ops" / "group_norm_silu.py").exists()


@pytest.mark.compiler
def test_without_torch_the_error_names_the_three_ways(tmp_path):
    completed, _ = build(tmp_path, FASTDISTILL_TORCH=str(tmp_path / "nowhere"), FASTDISTILL_CUDA="0")
    assert completed.returncode != 0
    for way in ("nowhere", "pip install torch", "FASTDISTILL_TORCH=", "--no-build-isolation", "torch >= 2.10"):
        assert way in completed.stderr


@pytest.mark.compiler
def test_headers_of_an_older_torch_are_refused(tmp_path):
    headers = tmp_path / "torch" / "include" / "torch" / "csrc" / "stable"
    headers.mkdir(parents=True)
    (headers / "library.h").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1'\n")
    completed, _ = build(tmp_path / "build", FASTDISTILL_TORCH=str(tmp_path), FASTDISTILL_CUDA="0")
    assert completed.returncode != 0
    assert "needs the headers of torch >= 2.10" in completed.stderr


@pytest.mark.compiler
def test_asking_for_cuda_without_nvcc_fails_and_auto_goes_on(monkeypatch):
    setup = load_setup()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("FASTDISTILL_CUDA", "1")
    with pytest.raises(SetupError, match="FASTDISTILL_CUDA=1, but no nvcc was found"):
        setup.nvcc_compiler()
    monkeypatch.setenv("FASTDISTILL_CUDA", "auto")
    assert setup.nvcc_compiler() is None
    monkeypatch.setenv("FASTDISTILL_CUDA", "yes")
    with pytest.raises(SetupError, match="FASTDISTILL_CUDA='yes': expected auto, 0 or 1"):
        setup.nvcc_compiler()


@pytest.mark.compiler
def test_architectures_come_from_the_list_then_the_gpu_then_the_default(monkeypatch):
    setup = load_setup()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 8.6;9.0a+PTX")
    assert setup.cuda_architectures() == ["8.0", "8.6", "9.0a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SetupError, match=r"'Hopper' is not of the form 9\.0 or 9\.0a"):
        setup.cuda_architectures()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    seen = subprocess.CompletedProcess([], 0, stdout="9.0\n9.0\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: seen)
    assert setup.cuda_architectures() == ["9.0a"]

    def no_driver(*a, **k):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", no_driver)
    assert setup.cuda_architectures() == ["8.0", "9.0a"]


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("12.0", (12, 0), True),
    ],
)
def test_which_gpu_runs_which_code(architecture, capability, runs):
    assert _native._runs_on(architecture, capability) is runs


@pytest.mark.gpu
def test_cuda_library_serves_the_gpu_that_is_here():
    assert _native.cuda_problem(torch.cuda.current_device()) == ""


@pytest.mark.compiler
def test_the_data_files_that_modules_read_are_package_data(monkeypatch):
    setup = load_setup()
    given = {}
    monkeypatch.setattr(setup, "setup", lambda **options: given.update(options))
    monkeypatch.chdir(ROOT)
    setup.main()
    packed = {
        path
        for package, patterns in given["package_data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    assert CLIP_MERGES in packed
    assert CLIP_MERGES.with_name("LICENSE") in packed
    assert {model / "model_index.json" for model in bundled_models().values()} <= packed
