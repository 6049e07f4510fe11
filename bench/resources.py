"""What every kernel costs a multiprocessor, read from its machine code: `python -m fastdistill.bench.resources`.

Triton kernels are compiled for each architecture as they would be launched; CUDA kernels are read from the compiled
library. No GPU is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from fastdistill.kernels.compile import Resources, compile_for, cuobjdump, resource_usage
from rich.console import Console
from rich.table import Table

from . import benchmark


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, technical specifications per compute capability)."""

    warps: int
    shared: int  # bytes
    blocks: int = 32
    registers: int = 65536
    reserved: int = 1024  # bytes of shared memory that the system takes from each block


_HOPPER = Multiprocessor(warps=64, shared=228 * 1024)
MULTIPROCESSORS = {
    80: Multiprocessor(warps=64, shared=164 * 1024),
    86: Multiprocessor(warps=48, shared=100 * 1024, blocks=16),
    89: Multiprocessor(warps=48, shared=100 * 1024, blocks=24),
    90: _HOPPER,
    100: _HOPPER,
    120: Multiprocessor(warps=48, shared=100 * 1024, blocks=24),
}


def resident_warps(sm: Multiprocessor, threads: int, registers: int, shared: int) -> int:
    """How many warps of such blocks a multiprocessor holds at a time.

    Registers are handed out to warps in pieces of 256, shared memory to blocks in pieces of 128 bytes.
    """
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = sm.registers // per_warp // warps
    by_shared = sm.shared // (-(-(shared + sm.reserved) // 128) * 128)
    return warps * min(sm.blocks, sm.warps // warps, by_registers, by_shared)


@dataclass(frozen=True)
class Version:
    """One compiled version of a kernel. threads: per block, at most. dynamic: whether it takes shared memory at launch,
    which the machine code does not tell."""

    backend: str
    kernel: str
    architecture: str
    threads: int
    resources: Resources
    dynamic: bool = False

    @property
    def warps(self) -> int:
        sm = MULTIPROCESSORS[_capability(self.architecture)]
        return resident_warps(sm, self.threads, self.resources.registers, self.resources.shared)

    @property
    def most_warps(self) -> int:
        return MULTIPROCESSORS[_capability(self.architecture)].warps


def _capability(architecture: str) -> int:
    """sm_90a: 90."""
    return int(re.sub(r"\D", "", architecture))


def triton_versions(op: str, capability: int) -> Iterator[Version]:
    """Every version of an op's Triton kernels, compiled for a compute capability (90 for 9.0). An op may have none."""
    if importlib.util.find_spec(f"fastdistill.kernels.{op}") is None:
        return
    for specialisation in importlib.import_module(f"fastdistill.kernels.{op}").specialisations():
        name = f"{op}.{specialisation.kernel.__name__.strip('_')}"
        threads = 32 * specialisation.options["num_warps"]
        resources = compile_for(capability, specialisation).resources
        yield Version("triton", name, f"sm_{capability}", threads, resources)


def cuda_versions(library: Path) -> Iterator[Version]:
    """Every kernel of a compiled library, for each architecture that it holds machine code for."""
    listing = subprocess.run([cuobjdump(), "--list-elf", library], capture_output=True, text=True, check=True).stdout
    for architecture in dict.fromkeys(re.findall(r"\.(sm_\w+)\.cubin", listing)):
        threads = _most_threads(library, architecture)
        reserved = (
            Multiprocessor.reserved if int(re.sub(r"\D", "", architecture)) >= 90 else 0
        )  # reported with the rest
        for function, found in resource_usage(library, architecture).items():
            resources = Resources(found.registers, found.spilled, max(0, found.shared - reserved))
            yield Version("cuda", _readable(function), architecture, threads[function], resources, dynamic=True)


def _most_threads(library: Path, architecture: str) -> dict[str, int]:
    """Per function the most threads its block may have, as its launch bounds say."""
    command = [cuobjdump(), "-elf", "-arch", architecture, library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, int] = defaultdict(lambda: 1024)
    for section in re.split(r"^\.nv\.info\.", text, flags=re.M)[1:]:
        bound = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x(\w+)", section.split("\n.", 1)[0])
        if bound:
            found[section.split(maxsplit=1)[0]] = int(bound[1], 16)
    return found


def _readable(function: str) -> str:
    """From a mangled name: file and kernel, `group_norm_silu_forward.apply_kernel`."""
    parts = _names(function)
    file = next((re.sub(r"^_GLOBAL__N__\w{8}_\d+_(\w+?)_cu_.*", r"\1", p) for p in parts if "_cu_" in p), "")
    return f"{file}.{parts[-1]}".strip(".")


def _names(mangled: str) -> list[str]:
    """The nested names of an Itanium-mangled function (`_ZN<length><name>…`), outermost first."""
    names, rest = [], re.sub(r"^_ZN?", "", mangled)
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match[0])
        names.append(rest[match.end() : end])
        rest = rest[end:]
    return names


def table(versions: Iterable[Version]) -> Table:
    """One line per kernel and architecture; ranges over its versions (dtypes, layouts, tiles)."""
    grouped: dict[tuple[str, str, str], list[Version]] = defaultdict(list)
    for version in versions:
        grouped[version.backend, version.kernel, version.architecture].append(version)
    result = Table(title="Machine code of every kernel")
    for heading in ("backend", "kernel", "for"):
        result.add_column(heading, no_wrap=True)
    for heading in ("versions", "threads", "registers", "spilled bytes", "shared bytes", "warps held", "occupancy"):
        result.add_column(heading, justify="right", no_wrap=True)
    for (backend, kernel, architecture), group in sorted(grouped.items()):
        shared = _range(v.resources.shared for v in group)
        result.add_row(
            backend,
            kernel,
            architecture,
            str(len(group)),
            _range(v.threads for v in group),
            _range(v.resources.registers for v in group),
            _range(v.resources.spilled for v in group),
            f"{shared} + launch" if group[0].dynamic else shared,
            _range(v.warps for v in group),
            _range((round(100 * v.warps / v.most_warps) for v in group), "%"),
        )
    return result


def _range(values: Iterable[int], unit: str = "") -> str:
    values = sorted(values)
    return f"{values[0]}{unit}" if values[0] == values[-1] else f"{values[0]}-{values[-1]}{unit}"


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def resources(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP...]", help="Triton kernels of these  [all]")] = None,
    arch: Annotated[str, typer.Option(help="compute capabilities that Triton compiles for")] = "80,90,100",
    cuda: Annotated[Path | None, typer.Option(help="compiled library  [default: the installed one]")] = None,
) -> None:
    """Print registers, spills, shared memory and occupancy of every kernel. Exit code 1 if one spills.

    Occupancy of a CUDA kernel counts its registers and static shared memory; what it takes at launch comes on top.
    """
    known = [str(capability) for capability in MULTIPROCESSORS]
    for name in ops or ():
        if name not in benchmark.OPS:
            raise typer.BadParameter(f"{name!r}: unknown; known: {', '.join(benchmark.OPS)}", param_hint="OP")
    for capability in arch.split(","):
        if capability not in known:
            raise typer.BadParameter(f"{capability!r}: unknown; known: {', '.join(known)}", param_hint="--arch")
    if cuda is not None and not cuda.exists():
        raise typer.BadParameter(f"{cuda} does not exist", param_hint="--cuda")
    library = cuda or Path(__file__).resolve().parents[1] / "fastdistill" / "_cuda.so"
    versions = [v for op in ops or benchmark.OPS for a in arch.split(",") for v in triton_versions(op, int(a))]
    if library.exists():
        versions += cuda_versions(library)
    console = Console()
    printed = table(versions)
    console.width = max(console.width, console.measure(printed, options=console.options.update(width=1000)).maximum)
    console.print(printed)
    if not library.exists():
        console.print(f"CUDA kernels: {library} was not built here (FASTDISTILL_CUDA=1 builds it without a GPU)")
    if any(version.resources.spilled for version in versions):
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m fastdistill.bench.resources")
