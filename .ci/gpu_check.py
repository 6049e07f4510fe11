#!/usr/bin/env python3
"""Everything that only a GPU can tell, in one go and without network: `make gpu-check OUT=DIR`.

Builds the libraries in place, runs the tests marked `gpu`, compute-sanitizer over the CUDA kernels, the benchmarks. A
step that fails does not stop the next; the exit code is 1 at the end. DIR then holds summary.md (one page),
results.jsonl, plots.tar and logs.tar, written anew after each step. Needs torch, triton, nvcc, pytest, hypothesis,
matplotlib, rich and typer in the python that runs it; diffusers may come by PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("build", "test", "sanitize", "bench")
LIMITS = {"build": 600, "test": 1200, "sanitize": 300, "bench": 480}  # seconds; of each sanitizer tool its own
PROVIDERS = (
    "cuda,triton,sdpa:cudnn,sdpa:flash,sdpa:efficient,torch,torch.other_layout,torch.compile,liger,flash_attn,quack"
)
BENCH = ["--mode", "all", "--dtype", "bfloat16,float32", "--providers", PROVIDERS, "--pairs", "50"]
# What the dry run reckons with, in seconds: guesses, since only a GPU could tell.
GUESSES = {"build": 60, "each gpu test": 1.0, "each sanitizer tool": 120}

# Each op's CUDA kernels (Triton's where it has no others), forward and backward, in every layout, on a small site and
# on sizes that divide nothing.
KERNELS = """
import torch
from fastdistill.bench.benchmark import OPS, Case, load
from fastdistill.bench.modes import MODES
odd = {
    "group_norm_silu": (96, 7, 5),
    "layer_norm": (7, 321),
    "geglu": (7, 66),
    "attention": (3, 7, 5, 40),
    "dmd_gradient": (3, 4, 7, 5),
    "weighted_squared_error": (3, 4, 65, 63),
    "lpips_distance": (37, 7, 5),
    "adversarial_loss": (3, 7, 5),
    "squared_norm": (3, 7, 5),
}
for op in map(load, OPS):
    known = {provider.name: provider for provider in op.providers}
    provider = known.get("cuda") or known["triton"]
    small = sorted(op.cases, key=lambda case: op.cost(case, torch.float32, "forward").bytes)[:3]
    for case in (*small, Case(odd[op.op], ())):
        for dtype in (torch.float32, torch.bfloat16):
            for layout in op.layouts:
                inputs = op.setup(case, dtype, layout, torch.device("cuda"))
                reasons = provider.missing(inputs)
                if reasons:
                    raise SystemExit(f"{op.op}: {reasons}")
                MODES["full"](provider.prepare(inputs), inputs).tensors()
                torch.cuda.synchronize()
                print(op.op, case.name, dtype, layout, flush=True)

from fastdistill.optim import FusedAdamW
for dtype in (torch.float32, torch.bfloat16):
    for state_bits in (32, 8):
        params = [torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for shape in ((70, 67), (3,), ())]
        ema = [p.detach().float().clone() for p in params]
        optimizer = FusedAdamW(params, max_grad_norm=1.0, ema=ema, state_bits=state_bits, backend="cuda")
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        torch.cuda.synchronize()
        print("adamw", f"{state_bits}-bit", dtype, "dense", flush=True)
"""

VERSIONS = """
import sys, torch
from fastdistill import info
versions = info.collect_versions() | {"cudnn": torch.backends.cudnn.version()}
print(", ".join(f"{name} {version}" for name, version in versions.items() if version))
print(", ".join(f"{gpu['name']} ({gpu['capability']})" for gpu in info._gpus()))
"""


@dataclass
class Step:
    """What came of one step: lines for the summary."""

    name: str
    failed: bool
    seconds: float
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ran:
    code: int | None  # None: it ran past its limit
    text: str
    seconds: float

    def outcome(self) -> str:
        if self.code is None:
            return f"stopped after {self.seconds:.0f} s, its limit"
        return "ok" if self.code == 0 else f"FAILED with exit code {self.code}"


def execute(command: Sequence[str], log: Path, limit: float, **environment: str) -> Ran:
    """Run a command in the repository, its output in `log`; past the limit it is killed with all that it started."""
    start = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    return Ran(code, log.read_text(errors="replace"), time.monotonic() - start)


def build(logs: Path, limit: float, cuda: str) -> Step:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
    setting = os.environ.get("FASTDISTILL_CUDA", cuda)
    ran = execute([*command, "--no-build-isolation", "-e", "."], logs / "build.log", limit, FASTDISTILL_CUDA=setting)
    lines = [f"build in place: {ran.outcome()}"]
    if ran.code != 0:
        lines += [f"    {line}" for line in ran.text.strip().splitlines()[-5:]]
    return Step("build", ran.code != 0, ran.seconds, lines)


def test(logs: Path, limit: float) -> Step:
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--color=no"]
    if _importable("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    ran = execute(command, logs / "tests.log", limit)
    results = outcomes(ran.text)
    counts = {kind: sum(each == kind for each in results.values()) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failures = [name for name, kind in results.items() if kind in ("FAILED", "ERROR")]
    lines = [f"pytest -m gpu: {ran.outcome()}; " + ", ".join(f"{n} {kind.lower()}" for kind, n in counts.items())]
    lines += [f"    {name}" for name in failures[:20]]
    if len(failures) > 20:
        lines.append(f"    and {len(failures) - 20} more in logs.tar")
    return Step("test", ran.code != 0 or not counts["PASSED"], ran.seconds, lines)


def outcomes(log: str) -> dict[str, str]:
    """Test to outcome, from the lines of `pytest -v`, with or without xdist; complete even if it was killed."""
    kinds = r"(PASSED|FAILED|ERROR|SKIPPED)"
    plain = re.compile(rf"^(tests/.+?) {kinds}\b.*$")
    parallel = re.compile(rf"^\[gw\d+\] \[ *\d+%\] {kinds} (tests/.+?) *$")
    results = {}
    for line in log.splitlines():
        if found := plain.match(line):
            results[found[1]] = found[2]
        elif found := parallel.match(line):
            results[found[2]] = found[1]
    return results


def sanitize(logs: Path, limit: float) -> Step:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        return Step("sanitize", False, 0, ["compute-sanitizer: missing, on PATH and in /usr/local/cuda/bin"])
    step = Step("sanitize", False, 0)
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", KERNELS]
        # Without torch's cache every tensor is an allocation of its own, and a step beyond it is seen.
        ran = execute(command, logs / f"{tool}.log", limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found = re.findall(r"^========= (.*(?:ERROR SUMMARY|RACECHECK SUMMARY).*)$", ran.text, re.MULTILINE)
        step.lines.append(f"{tool}: {ran.outcome()}; {found[-1] if found else 'no summary'}")
        step.failed |= ran.code != 0
        step.seconds += ran.seconds
    return step


def bench(logs: Path, limit: float, place: Path) -> Step:
    """Each op in a process of its own: a kernel that breaks the device spoils its own figures only."""
    start, step = time.monotonic(), Step("bench", False, 0)
    listed = execute(
        [sys.executable, "-c", "from fastdistill.bench.benchmark import OPS; print(*OPS)"], logs / "ops", 60
    )
    if listed.code != 0:
        return Step("bench", True, listed.seconds, [f"fastdistill.bench cannot be imported: {listed.outcome()}"])
    for name, options in (
        ("adamw", ["--device", "cuda"]),
        ("real_size", ["--out", str(logs / "bench-real_size.json")]),
    ):
        ran = execute([sys.executable, "-m", f"fastdistill.bench.{name}", *options], logs / f"bench-{name}.log", 120)
        step.lines.append(f"bench {name}: {ran.outcome()} in {ran.seconds:.0f} s; its table is in logs.tar")
        step.failed |= ran.code != 0
    work = [["engine", "training"], *([op] for op in listed.text.split())]
    for position, ops in enumerate(work):
        seconds = (limit - (time.monotonic() - start)) / (len(work) - position)
        options = ["--device", "cuda", *BENCH, "--budget", f"{seconds:.0f}", "--out", str(place)]
        log = logs / f"bench-{'-'.join(ops)}.log"
        ran = execute([sys.executable, "-m", "fastdistill.bench", *ops, *options], log, seconds + 90)
        step.lines.append(f"bench {' '.join(ops)}: {ran.outcome()} in {ran.seconds:.0f} s")
        telling = [line for line in ran.text.splitlines() if "rows were left out" in line or "FAILED" in line]
        if ran.code != 0:
            telling += ran.text.strip().splitlines()[-1:]
        step.lines += [f"    {line[:300]}" for line in telling[:8]]
        step.failed |= ran.code != 0
    step.seconds = time.monotonic() - start
    return step


def figures(results: Path) -> list[str]:
    """Tables of the summary, from the lines of results.jsonl."""
    if not results.exists():
        return ["No results."]
    rows = [record for line in results.read_text().splitlines() if "key" in (record := json.loads(line))]
    measured = [row for row in rows if "speed" in row]
    lines = [
        "| op | mode | dtype | layout | cache | provider | shapes | median | worst | of the limit |",
        "|" + "---|" * 10,
    ]
    groups: dict[tuple, list[dict]] = {}
    for row in measured:
        key = row["key"]
        if key["cache"] != "eager" and key["mode"] in ("forward", "full", "cached prompt", "new prompt", "dmd update"):
            group = tuple(key[name] for name in ("op", "mode", "dtype", "layout", "cache", "provider"))
            groups.setdefault(group, []).append(row)
    for group, members in groups.items():
        ratios = [row["speed"]["ratio"] for row in members]
        shares = [100 * row["limit"]["us"] / row["speed"]["ours_us"] for row in members if "limit" in row]
        share = f"{statistics.median(shares):.0f} %" if shares else "-"
        cells = (*group, str(len(members)), f"{statistics.median(ratios):.2f}x", f"{min(ratios):.2f}x", share)
        lines.append(f"| {' | '.join(cells)} |")
    ours = [row for row in measured if row["key"]["provider"] in ("cuda", "triton", "fastdistill")]
    worst = sorted(ours, key=lambda row: row["speed"]["ratio"])[:12]
    lines += ["", "Worst rows of this package:", ""]
    lines += [f"- {_name(row)}: {row['speed']['ratio']:.2f}x, {row['speed']['ours_us']:.1f} us" for row in worst]
    bad = [row for row in rows if row["status"] in ("failed", "raised")]
    if bad:
        lines += ["", f"Rows beyond their error limit or that raised ({len(bad)}):", ""]
        lines += [f"- {_name(row)}: {row.get('missing') or row['accuracy']}" for row in bad[:12]]
    return lines


def _name(row: dict) -> str:
    return " ".join(row["key"][name] for name in ("op", "mode", "dtype", "layout", "cache", "provider", "case"))


def write(out: Path, logs: Path, place: Path, versions: str, steps: Sequence[Step]) -> None:
    """The files of DIR, as far as the steps have come."""
    lines = ["# GPU check", "", *versions.splitlines(), ""]
    for step in steps:
        verdict = "FAILED" if step.failed else "passed" if step.seconds else "not run"
        lines += [f"## {step.name}: {verdict} ({step.seconds:.0f} s)", "", *(f"- {line}" for line in step.lines), ""]
    results = place / "results.jsonl"
    if any(step.name == "bench" for step in steps):
        lines += ["## Figures", "", *figures(results), ""]
    (out / "summary.md").write_text("\n".join(lines))
    if results.exists():
        shutil.copy(results, out / "results.jsonl")
    for name, files in (("plots", sorted(place.glob("*.png"))), ("logs", sorted(logs.iterdir()))):
        if files:
            with tarfile.open(out / f"{name}.tar", "w") as archive:
                for file in files:
                    archive.add(file, arcname=file.name)


def dry_run(logs: Path, limits: dict[str, float]) -> int:
    step = build(logs, limits["build"], "auto")
    print(*step.lines, sep="\n")
    collected = execute(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", "--color=no"], logs / "tests.log", 300
    )
    tests = [line for line in collected.text.splitlines() if line.startswith("tests/") and "::" in line]
    rows = execute(
        [sys.executable, "-m", "fastdistill.bench", "all", "--device", "cuda", *BENCH, "--dry-run"],
        logs / "rows.log",
        300,
    )
    print(*tests, rows.text.rstrip(), sep="\n")
    guess = GUESSES["build"] + GUESSES["each gpu test"] * len(tests) + 2 * GUESSES["each sanitizer tool"]
    print(
        f"{len(tests)} gpu tests; predicted duration: about {(guess + limits['bench']) / 60:.0f} minutes "
        f"({', '.join(f'{name} {seconds} s' for name, seconds in GUESSES.items())}, bench {limits['bench']:.0f} s)"
    )
    return int(step.failed or collected.code != 0 or rows.code != 0)


def _importable(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def _sees_a_gpu() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="DIR")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"of {','.join(STEPS)}")
    parser.add_argument("--dry-run", action="store_true", help="build, list tests and rows, predict the duration")
    for name, seconds in LIMITS.items():
        parser.add_argument(f"--{name}-seconds", type=float, default=seconds, help=f"default {seconds}")
    options = parser.parse_args(arguments)
    chosen = [name for name in options.steps.split(",") if name]
    unknown = [name for name in chosen if name not in STEPS]
    if unknown:
        parser.error(f"--steps: unknown {unknown[0]!r}; known: {', '.join(STEPS)}")
    limits = {name: getattr(options, f"{name}_seconds") for name in LIMITS}
    if not options.dry_run and not _sees_a_gpu():
        print("error: torch sees no GPU here; --dry-run (make gpu-check DRY_RUN=1) works without one", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        logs, place = Path(scratch) / "logs", Path(scratch) / "bench"
        logs.mkdir()
        place.mkdir()
        if options.dry_run:
            return dry_run(logs, limits)
        options.out.mkdir(parents=True, exist_ok=True)
        steps: list[Step] = []
        versions = ""
        for name in chosen:
            print(f"{name} ...", flush=True)
            run = {
                "build": lambda: build(logs, limits["build"], "1"),
                "test": lambda: test(logs, limits["test"]),
                "sanitize": lambda: sanitize(logs, limits["sanitize"]),
                "bench": lambda: bench(logs, limits["bench"], place),
            }[name]
            steps.append(run())
            print(*steps[-1].lines, sep="\n", flush=True)
            versions = versions or execute([sys.executable, "-c", VERSIONS], logs / "versions.log", 120).text
            write(options.out, logs, place, versions, steps)
    print(f"{options.out / 'summary.md'}")
    return int(any(step.failed for step in steps))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
