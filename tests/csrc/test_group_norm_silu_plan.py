"""The CUDA launch plans of group_norm_silu, compiled for the host: who covers what, and within which limits."""

import math
import random
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from fastdistill.bench.group_norm_silu import BENCHMARK

pytestmark = pytest.mark.compiler
HERE = Path(__file__).resolve().parent
CUDA = HERE.parent.parent / "csrc" / "cuda"


@dataclass(frozen=True)
class Device:
    """What cudaDeviceGetAttribute says, from the data sheets and the CUDA C++ Programming Guide."""

    multiprocessors: int
    shared_kib: int
    l2_mib: int
    cluster: int = 8
    cooperative: bool = True
    threads: int = 1024

    def __str__(self):
        limits = (self.multiprocessors, self.threads, self.shared_kib * 1024, self.l2_mib << 20)
        return " ".join(map(str, (*limits, self.cluster, int(self.cooperative))))


DEVICES = {
    "H200": Device(132, 227, 50),
    "A100": Device(108, 163, 40, cluster=1),
    "RTX 4090": Device(128, 99, 72, cluster=1),
    "B200": Device(148, 227, 126),
    "H200 with clusters of 16": Device(132, 227, 50, cluster=16),
    "a device of which nothing is known": Device(1, 48, 4, cluster=1, cooperative=False),
}


@dataclass(frozen=True)
class Call:
    shape: tuple[int, ...]  # (N, C, *spatial)
    groups: int = 32
    bytes: int = 2
    channels_last: bool = True
    backward: bool = False

    def __str__(self):
        n, c, *spatial = self.shape
        s = math.prod(spatial)
        row = c if self.channels_last else s
        vector = 16 // self.bytes if row * self.bytes % 16 == 0 else 1
        numbers = (n, c, s, self.groups, int(self.channels_last), self.bytes, vector, 1 + self.backward)
        return " ".join(map(str, numbers))


@dataclass(frozen=True)
class Plan:
    regime: str
    cluster: int
    blocks: int
    threads: int
    shared_bytes: int
    channels: int


@pytest.fixture(scope="session")
def plans(tmp_path_factory):
    """Makes and checks the plans of (device, call) pairs."""
    program = tmp_path_factory.mktemp("plan") / "plan"
    source = HERE / "group_norm_silu_plan.cpp"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined"]
    subprocess.run([*command, "-fno-sanitize-recover", f"-I{CUDA}", source, "-o", program], check=True)

    def run(pairs):
        pairs = list(pairs)
        lines = "".join(f"{device} {call}\n" for device, call in pairs)
        done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
        answers = done.stdout.splitlines()
        assert len(answers) == len(pairs)
        wrong = [(call, answer) for (_, call), answer in zip(pairs, answers) if answer.startswith("wrong")]
        assert not wrong
        return [Plan(regime, *map(int, numbers)) for regime, *numbers in (a.split() for a in answers)]

    return run


def both_ways(shape, batch=1):
    return [
        Call((batch, *shape), bytes=size, channels_last=last, backward=backward)
        for size in (2, 4)
        for last in (False, True)
        for backward in (False, True)
    ]


SITES = [case.shape for case in BENCHMARK.cases]


@pytest.mark.parametrize("device", DEVICES)
def test_every_site_of_the_unets_and_the_vae_is_covered_exactly_once_within_the_limits(plans, device):
    calls = [call for shape in SITES for batch in (1, 4) for call in both_ways(shape, batch)]
    # The VAE of a 1024 px image, and offsets beyond 2^31 elements.
    calls += [call for shape in ((512, 512, 512), (128, 1024, 1024)) for call in both_ways(shape)]
    calls += both_ways((256, 1024, 1024), batch=9)
    made = plans((DEVICES[device], call) for call in calls)
    print(Counter(plan.regime for plan in made))


@pytest.mark.parametrize("device", DEVICES)
def test_odd_shapes_are_covered_exactly_once_within_the_limits(plans, device):
    rng = random.Random(device)
    calls = []
    for _ in range(600):
        per_group = rng.choice((1, 2, 3, 4, 5, 8, 10, 16, 20, 30, 33, 40, 80, 255, 2049))
        groups = rng.choice((1, 1, 2, 3, 7, 8, 32))
        pixels = rng.choice((1, 2, 3, 7, 8, 61, 64, 100, 255, 256, 1031, 4096, 5000, 65536, 100_003))
        calls.append(
            Call(
                (rng.choice((1, 1, 2, 3, 17, 300)), per_group * groups, pixels),
                groups,
                rng.choice((2, 4)),
                rng.random() < 0.5,
                rng.random() < 0.5,
            )
        )
    small = replace(DEVICES[device], threads=64, shared_kib=8, multiprocessors=40)  # so that every regime is taken
    plans((DEVICES[device], call) for call in calls)
    made = plans((small, call) for call in calls)
    assert {plan.regime for plan in made} >= {"cluster", "two-pass"}
    if small.cooperative:
        assert "cooperative" in {plan.regime for plan in made}


# (C, H, W) at batch 1, 16 bit, channels last: regime, blocks of a cluster and of the grid, forward and backward. It is
# the table in docs/kernels.md.
ON_H200 = {
    (1280, 8, 8): (("cluster", 1, 16), ("cluster", 1, 16)),
    (1280, 16, 16): (("cluster", 2, 32), ("cluster", 4, 64)),
    (640, 32, 32): (("cluster", 8, 64), ("cluster", 8, 128)),
    (320, 64, 64): (("cluster", 8, 64), ("cluster", 8, 64)),
    (960, 64, 64): (("cooperative", 1, 132), ("cooperative", 1, 132)),
    (320, 128, 128): (("cooperative", 1, 132), ("cooperative", 1, 132)),
    (640, 128, 128): (("cooperative", 1, 132), ("two-pass", 1, 1030)),
    (512, 128, 128): (("cluster", 4, 128), ("cluster", 4, 128)),
    (256, 256, 256): (("cluster", 8, 128), ("two-pass", 1, 1024)),
    (512, 256, 256): (("cluster", 8, 256), ("two-pass", 1, 1024)),
    (256, 512, 512): (("two-pass", 1, 1024), ("two-pass", 1, 1024)),
    (128, 512, 512): (("two-pass", 1, 1024), ("two-pass", 1, 1024)),
}


@pytest.mark.parametrize("shape", ON_H200)
def test_which_regime_serves_a_site_on_an_h200(plans, shape):
    calls = [Call((1, *shape), backward=backward) for backward in (False, True)]
    made = plans((DEVICES["H200"], call) for call in calls)
    assert tuple((plan.regime, plan.cluster, plan.blocks) for plan in made) == ON_H200[shape]
