"""Occupancy, and the table of what every kernel costs."""

import io

import pytest
from fastdistill.bench import resources
from fastdistill.bench.resources import MULTIPROCESSORS, Version, resident_warps, table, triton_versions
from fastdistill.kernels.compile import Resources
from rich.console import Console
from typer.testing import CliRunner


@pytest.mark.parametrize(
    ("capability", "threads", "registers", "shared", "warps"),
    [
        (80, 256, 32, 0, 64),
        (80, 256, 40, 0, 48),  # 1280 registers a warp: 51 warps, 6 blocks of 8
        (80, 512, 128, 0, 16),
        (80, 256, 255, 0, 8),
        (80, 32, 32, 0, 32),  # at most 32 blocks
        (90, 256, 32, 100 * 1024, 16),  # two blocks' shared memory
        (90, 256, 32, 113 * 1024, 16),  # 2 x (113 + 1) KiB is all of it
        (90, 256, 32, 114 * 1024, 8),
        (86, 256, 32, 0, 48),
        (89, 1024, 32, 0, 32),
        (90, 1024, 65, 0, 0),  # cannot run at all
    ],
)
def test_occupancy_follows_registers_shared_memory_and_the_limits_of_a_multiprocessor(
    capability, threads, registers, shared, warps
):
    assert resident_warps(MULTIPROCESSORS[capability], threads, registers, shared) == warps


def version(kernel="op.kernel", architecture="sm_90a", threads=256, registers=32, spilled=0, **others):
    return Version("cuda", kernel, architecture, threads, Resources(registers, spilled, 0), **others)


def printed(*versions):
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(table(versions))
    return console.export_text()


def test_versions_of_a_kernel_share_a_line_with_their_ranges():
    text = printed(version(), version(registers=64, spilled=8), version(architecture="sm_80"), version("op.other"))
    (line,) = (line for line in text.splitlines() if "op.kernel" in line and "sm_90a" in line)
    for cell in (" 2 ", " 32-64 ", " 0-8 ", " 32-64 ", " 50-100% "):
        assert cell in line
    assert sum("op." in line for line in text.splitlines()) == 3


def test_a_mangled_name_is_read_as_file_and_kernel():
    mangled = (
        "_ZN11fastdistill4cuda66_GLOBAL__N__f23f8760_27_group_norm_silu_backward_cu_7eb7f025_2672312"
        "apply_kernelIfLi1ELb0EEEvNS1_8BackwardE"
    )
    assert resources._readable(mangled) == "group_norm_silu_backward.apply_kernel"


@pytest.mark.compiler
def test_triton_kernels_are_compiled_as_they_are_launched():
    versions = list(triton_versions("geglu", 90))
    assert {v.kernel.split(".")[0] for v in versions} == {"geglu"}
    assert all(0 < v.resources.registers <= 255 and v.resources.spilled == 0 and v.warps > 0 for v in versions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conv"], "'conv': unknown; known: group_norm_silu"),
        (["--arch", "70"], "'70': unknown; known: 80, 86, 89, 90, 100, 120"),
        (["--cuda", "missing.so"], "missing.so does not exist"),
    ],
)
def test_bad_options_name_the_value_and_what_is_known(arguments, message):
    result = CliRunner().invoke(resources.app, arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_spill_makes_the_exit_code_1(monkeypatch):
    monkeypatch.setattr(resources, "triton_versions", lambda op, capability: [version(spilled=4)])
    assert CliRunner().invoke(resources.app, ["group_norm_silu", "--arch", "90"]).exit_code == 1
    monkeypatch.setattr(resources, "triton_versions", lambda op, capability: [version()])
    assert CliRunner().invoke(resources.app, ["group_norm_silu", "--arch", "90"]).exit_code == 0
