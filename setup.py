"""Builds csrc/ into two libraries on LibTorch's stable ABI, fastdistill/_cpu.so and fastdistill/_cuda.so.

They use no Python C API and only the C functions that every torch >= 2.10 has, so one build serves every Python and
every such torch. Settings (environment variables):

    FASTDISTILL_TORCH      folder of a torch package whose headers to use (default: the importable torch, else the one
                           in the target environment, which pip's build isolation hides but does not move)
    FASTDISTILL_CUDA       auto (default: build _cuda when nvcc is found), 0 (never), 1 (fail without nvcc)
    TORCH_CUDA_ARCH_LIST   as for torch's own extensions, "8.0;9.0a" (default: the visible GPU, else 8.0;9.0a)
    FASTDISTILL_WERROR     1: warnings are errors
    CXX, CUDACXX, CUDA_HOME, MAX_JOBS   as usual
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

CSRC = Path(__file__).resolve().parent / "csrc"
TORCH_MINIMUM = (2, 10)
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10: the oldest torch that the libraries load into
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0a"
# The CPU loops are compiled once per instruction set; one is chosen at run time (csrc/cpu/capability.cpp).
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}
COMMON_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"


def torch_folder() -> Path:
    """The torch package whose headers are used; found without importing it."""
    named = os.environ.get("FASTDISTILL_TORCH")
    if named:
        candidates = [Path(named), Path(named) / "torch"]
    else:
        spec = importlib.util.find_spec("torch")
        candidates = [Path(spec.origin).parent] if spec and spec.origin else []
        candidates.append(Path(sysconfig.get_path("platlib")) / "torch")
    for folder in candidates:
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            version = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())[1]
            if tuple(int(part) for part in version.split(".")[:2]) < TORCH_MINIMUM:
                break
            return folder
    raise SetupError(
        "fastdistill needs the headers of torch >= 2.10 to build"
        + (f", and FASTDISTILL_TORCH={named!r} does not hold them" if named else ", and none was found")
        + ". One of these helps:\n"
        "  1. install torch into this environment first: pip install torch\n"
        "  2. name a torch package folder: FASTDISTILL_TORCH=/path/to/site-packages/torch pip install .\n"
        "  3. build without isolation, with torch, setuptools and ninja installed: pip install --no-build-isolation .\n"
        "     (uv needs this one: its isolated builds do not see the target environment)"
    )


def cxx_compiler() -> str | None:
    named = os.environ.get("CXX")
    if named:
        if not shutil.which(shlex.split(named)[0]):
            raise SetupError(f"CXX={named!r}: no such compiler")
        return named
    return next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


def nvcc_compiler() -> str | None:
    """nvcc's path, None when the CUDA library is not wanted or cannot be built."""
    wanted = os.environ.get("FASTDISTILL_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SetupError(f"FASTDISTILL_CUDA={wanted!r}: expected auto, 0 or 1")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    places = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    found = next((place for place in places if place and shutil.which(place)), None)
    if wanted == "1" and not found:
        raise SetupError("FASTDISTILL_CUDA=1, but no nvcc was found: put it on PATH, or set CUDA_HOME or CUDACXX")
    return found


def cuda_architectures() -> list[str]:
    """Such as ["8.0", "9.0a"]; Hopper is always built with its own instructions (the "a" of 9.0a)."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not listed:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            seen = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError):
            seen = []
        listed = ";".join(sorted({"9.0a" if capability == "9.0" else capability for capability in seen}))
    architectures = [entry.removesuffix("+PTX") for entry in re.split(r"[;, ]+", listed or DEFAULT_CUDA_ARCHITECTURES)]
    for architecture in architectures:
        if not re.fullmatch(r"\d+\.\d[af]?", architecture):
            raise SetupError(f"TORCH_CUDA_ARCH_LIST={listed!r}: {architecture!r} is not of the form 9.0 or 9.0a")
    return architectures


class NinjaFile:
    """Collects compile and link steps."""

    def __init__(self) -> None:
        self.lines = [
            "ninja_required_version = 1.10",
            "rule compile",
            "  command = $compiler -MD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            # ptxas's report of registers, shared memory and spills stays beside the object.
            "rule compile_cuda",
            "  command = $compiler -MD -MF $out.d $flags -c $in -o $out > $out.log 2>&1 || { cat $out.log; false; }",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule link",
            "  command = $compiler -shared -o $out $in $flags",
            "  description = link $out",
        ]

    def add(self, rule: str, out: Path, inputs: list[Path], compiler: str, flags: str, implicit: tuple = ()) -> Path:
        escape = lambda path: str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # noqa: E731
        after = f" | {' '.join(map(escape, implicit))}" if implicit else ""
        self.lines += [
            f"build {escape(out)}: {rule} {' '.join(map(escape, inputs))}{after}",
            f"  compiler = {compiler}",
            f"  flags = {flags}",
        ]
        return out

    def run(self, folder: Path, verbose: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        jobs = os.environ.get("MAX_JOBS")
        command += ["-C", str(folder), *(["-j", jobs] if jobs else []), *(["-v"] if verbose else [])]
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SetupError("fastdistill: compiling csrc/ failed; the compiler's own message stands above") from error


def add_cpu_library(ninja: NinjaFile, out: Path, temp: Path, torch: Path, cxx: str, werror: bool) -> None:
    flags = (
        f"{COMMON_FLAGS} -isystem {shlex.quote(str(torch / 'include'))} -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
    )
    flags += " -Werror" if werror else ""
    isas = ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"baseline": ""}
    objects = []
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        variants = isas.items() if source.stem.endswith("_kernel") else [("", "")]
        for isa, isa_flags in variants:
            extra = f"-DFASTDISTILL_ISA={isa} {isa_flags}" if isa else ""
            target = temp / f"{source.stem}{'.' + isa if isa else ''}.o"
            objects.append(ninja.add("compile", target, [source], cxx, f"{flags} {extra}"))
    link = f"-L{shlex.quote(str(torch / 'lib'))} -Wl,--as-needed -ltorch_cpu -Wl,-z,defs"
    ninja.add("link", out, objects, cxx, link)


def add_cuda_library(
    ninja: NinjaFile, out: Path, temp: Path, torch: Path, cxx: str, nvcc: str, architectures: list[str], werror: bool
) -> None:
    codes = [architecture.replace(".", "") for architecture in architectures]
    machine_code = " ".join(f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes)
    flags = f"{machine_code} -std=c++17 -O3 -ccbin {shlex.quote(cxx)} -Xptxas -v"
    flags += f" -isystem {shlex.quote(str(torch / 'include'))}"
    flags += f" -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} -DUSE_CUDA"
    flags += f" -DFASTDISTILL_CUDA_ARCHS='\"{';'.join(architectures)}\"'"
    flags += " -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
    flags += " -Werror all-warnings -Xcompiler -Werror" if werror else ""
    objects = [
        ninja.add("compile_cuda", temp / f"{source.stem}.cuda.o", [source], nvcc, flags)
        for source in sorted((CSRC / "cuda").glob("*.cu"))
    ]
    # A CPU-only torch has no libtorch_cuda.so to link against. An empty library of that name makes the loader look for
    # the real one, which a torch with CUDA has already loaded.
    empty = temp / "empty.cpp"
    temp.mkdir(parents=True, exist_ok=True)
    empty.write_text("")
    stub = ninja.add("link", temp / "stub" / "libtorch_cuda.so", [empty], cxx, "-Wl,-soname,libtorch_cuda.so -fPIC")
    # nvcc links, because it knows where its static runtime is, also when the nvcc on PATH is a wrapper.
    link = (
        f"{machine_code} -ccbin {shlex.quote(cxx)} --cudart static -Xlinker --exclude-libs,ALL -Xlinker --no-as-needed"
        f" -L{shlex.quote(str(stub.parent))} -ltorch_cuda -L{shlex.quote(str(torch / 'lib'))} -ltorch_cpu"
    )
    ninja.add("link", out, objects, nvcc, link, implicit=(stub,))


class build_libraries(build_ext):
    """Replaces the compilation of Python extensions by ninja over csrc/, and keeps a record for `fastdistill info`."""

    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + ".so"  # no Python tag: these are not Python extensions

    def build_extensions(self) -> None:
        werror = os.environ.get("FASTDISTILL_WERROR") == "1"
        cxx, nvcc = cxx_compiler(), nvcc_compiler()
        record = {"cpu": "", "cuda": ""}  # why a library was not built; empty when it was
        if cxx is None:
            record["cpu"] = record["cuda"] = "no C++ compiler (g++, c++, clang++ or CXX) was found at install time"
        elif nvcc is None:
            off = os.environ.get("FASTDISTILL_CUDA") == "0"
            record["cuda"] = "FASTDISTILL_CUDA=0 at install time" if off else "nvcc was not found at install time"
        for name, reason in record.items():
            if reason:
                print(f"fastdistill: the _{name} library is not built: {reason}", file=sys.stderr)
        wanted = [e for e in self.extensions if not record[e.name.rpartition("._")[2]]]
        self.extensions = wanted

        if wanted:
            torch, ninja, temp = torch_folder(), NinjaFile(), Path(self.build_temp).resolve()
            record["torch_headers"] = (
                (torch / "version.py").read_text().split("__version__ = ")[1].split()[0].strip("'")
            )
            for extension in wanted:
                out = Path(self.get_ext_fullpath(extension.name)).resolve()
                out.parent.mkdir(parents=True, exist_ok=True)
                if extension.name.endswith("_cuda"):
                    record["cuda_architectures"] = ";".join(cuda_architectures())
                    add_cuda_library(ninja, out, temp, torch, cxx, nvcc, cuda_architectures(), werror)
                else:
                    add_cpu_library(ninja, out, temp, torch, cxx, werror)
            ninja.run(temp, verbose=os.environ.get("FASTDISTILL_VERBOSE") == "1")
        self._write_record(record)

    def copy_extensions_to_source(self) -> None:
        # A library left from an earlier build must not pass for a new one.
        for library in (Path(__file__).resolve().parent / "fastdistill").glob("_c*.so"):
            library.unlink()
        super().copy_extensions_to_source()
        shutil.copy(self._record_path(), Path(__file__).resolve().parent / "fastdistill" / "_build.json")

    def _record_path(self) -> Path:
        return Path(self.build_lib) / "fastdistill" / "_build.json"

    def _write_record(self, record: dict) -> None:
        self._record_path().parent.mkdir(parents=True, exist_ok=True)
        self._record_path().write_text(json.dumps(record, indent=1) + "\n")


class wheel_for_every_python(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


ROOMS = ("kernels", "training", "bench")  # top-level folders that install as fastdistill.<room>


def main() -> None:
    packages = find_packages(include=["fastdistill", "fastdistill.*"])
    package_dir = {"fastdistill": "fastdistill"}
    for room in ROOMS:
        package_dir[f"fastdistill.{room}"] = room
        packages += [f"fastdistill.{room}", *(f"fastdistill.{room}.{p}" for p in find_packages(room))]
    setup(
        packages=packages,
        package_dir=package_dir,
        package_data={
            "fastdistill": ["py.typed"],
            "fastdistill.models": ["bundled/**/*", "clip_vocabulary/*"],
            "fastdistill.ops": ["attention_tables/*.json"],
        },
        ext_modules=[Extension("fastdistill._cpu", []), Extension("fastdistill._cuda", [])],
        cmdclass={"build_ext": build_libraries, "bdist_wheel": wheel_for_every_python},
        zip_safe=False,
    )


if __name__ == "__main__":
    main()
