"""The count of padding, tiles, blocks and bytes of attention, against hand-computed numbers."""

import pytest
import torch
from fastdistill.bench.attention import BENCHMARK
from fastdistill.bench.attention_tiles import LIBRARIES, _kernel, of_library, ours
from fastdistill.bench.cli import app
from fastdistill.bench.devices import KNOWN
from fastdistill.kernels.attention.specialisations import probes
from typer.testing import CliRunner

FLASH_2, FLASH_3 = LIBRARIES
LEAST = {"forward": 100, "backward": 200}


@pytest.mark.parametrize(
    ("library", "each", "shape", "flops", "blocks", "tile"),
    [
        (FLASH_2, "forward", (8, 4096, 4096, 40), 4 * 8 * 4096 * 4096 * 64, 8 * 32, "128x128"),
        (FLASH_2, "forward", (8, 1024, 77, 80), 4 * 8 * 1024 * 128 * 96, 8 * 8, "128x64"),
        (FLASH_2, "backward", (8, 1024, 77, 80), 10 * 8 * 1024 * 128 * 96, 8 * 1, "64x128"),
        (FLASH_3, "forward", (8, 64, 77, 160), 4 * 8 * 128 * 112 * 192, 8 * 1, "128x112"),
        (FLASH_3, "forward", (20, 1024, 77, 64), 4 * 20 * 1152 * 192 * 64, 20 * 6, "192x192"),
        (FLASH_3, "backward", (8, 256, 256, 160), 10 * 8 * 256 * 288 * 192, 8 * 3, "64x96"),
    ],
    ids=str,
)
def test_libraries_pad_queries_keys_and_head_dim(library, each, shape, flops, blocks, tile):
    (kernel,) = of_library(library, shape, {each: LEAST[each]}).kernels
    assert (kernel.tile, kernel.blocks) == (tile, blocks)
    assert (kernel.cost.flops, kernel.cost.bytes) == (flops, LEAST[each])


def test_no_library_has_a_kernel_for_head_dim_512():
    assert [of_library(each, (1, 4096, 4096, 512), LEAST) for each in LIBRARIES] == [None, None]


# Two products forward; backward three where queries are owned and four where keys are, or five at once.
@pytest.mark.parametrize(
    ("each", "shape", "kernels"),
    [
        # 40 columns are 32 + 16, 77 keys are 64 + 16.
        ("forward", (8, 4096, 77, 40), [("64x80", 8 * 64, 4 * 8 * 4096 * 80 * 48)]),
        ("forward", (8, 1024, 1024, 80), [("64x64", 8 * 16, 4 * 8 * 1024 * 1024 * 80)]),
        # Two parts of 256 columns, each with the whole of q kᵀ.
        ("forward", (1, 4096, 4096, 512), [("64x32", 2 * 64, 2 * 4096 * 4096 * 2 * (512 + 256))]),
        (
            "backward",
            (8, 1024, 1024, 80),
            [
                ("64x32", 8 * 16, 6 * 8 * 1024 * 1024 * 80),
                ("32x64", 8 * 16, 8 * 8 * 1024 * 1024 * 80),
            ],
        ),
        (
            "backward",
            (1, 4096, 4096, 512),
            [
                ("64x16", 2 * 64, 2 * 4096 * 4096 * 2 * (2 * 512 + 256)),
                ("16x64", 2 * 64, 2 * 4096 * 4096 * 2 * (2 * 512 + 2 * 256)),
            ],
        ),
        # All 80 keys in a program, 64 columns in one slice; the queries in 16 splits, added by blocks of 512 values.
        # 16 queries at a time where the 80 columns are 128 in one slice.
        (
            "backward",
            (8, 1024, 77, 80),
            [("16x80 in 16 splits", 8 * 16, 10 * 8 * 1024 * 80 * 128), ("16 splits added", -(-8 * 77 * 80 // 512), 0)],
        ),
        (
            "backward",
            (8, 4096, 77, 40),
            [("32x80 in 16 splits", 8 * 16, 10 * 8 * 4096 * 80 * 64), ("16 splits added", -(-8 * 77 * 40 // 512), 0)],
        ),
    ],
    ids=str,
)
def test_ours_are_counted_from_the_plan_of_the_launches(each, shape, kernels):
    found = ours(shape, torch.bfloat16, (each,), 132)
    assert [(kernel.tile, kernel.blocks, kernel.cost.flops) for kernel in found.kernels] == kernels


def test_bytes_are_those_of_every_tensor_that_a_kernel_takes():
    forward, short, added = ours((8, 4096, 77, 40), torch.float16, ("forward", "backward"), 132).kernels
    of_queries, of_keys, lse = 2 * 8 * 4096 * 40, 2 * 8 * 77 * 40, 4 * 8 * 4096
    assert forward.cost.bytes == 2 * of_queries + 2 * of_keys + lse
    partial = 2 * 16 * 2 * of_keys  # k's and v's gradients, float32, 16 splits
    assert short.cost.bytes == 4 * of_queries + 2 * of_keys + lse + partial
    assert added.cost.bytes == partial + 2 * of_keys


@pytest.mark.parametrize("case", BENCHMARK.cases, ids=lambda case: case.name)
def test_no_tiling_does_less_than_the_useful_work(case):
    for mode in ("forward", "backward", "full"):
        least = BENCHMARK.cost(case, torch.bfloat16, mode)
        found = BENCHMARK.tilings(case, torch.bfloat16, mode, KNOWN["h200"])
        assert [each.by for each in found][-1] == "triton"
        for each in found:
            assert each.cost.flops >= least.flops
            assert each.cost.bytes >= least.bytes


def test_every_kernel_of_the_package_can_be_counted():
    counted = {launch.kernel.__name__: _kernel(launch) for probe in probes() for launch in probe.launches()}
    assert len(counted) == 7


def test_head_dims_of_40_80_and_160_lose_little_to_padding():
    for width, padded in ((40, 48), (80, 80), (160, 160)):
        found = ours((8, 1024, 1024, width), torch.bfloat16, ("forward",), 132)
        assert found.cost.flops == 4 * 8 * 1024 * 1024 * padded


def test_our_tiles_are_planned_for_one_gpu_where_there_is_none_and_libraries_for_16_bit():
    assert ours((8, 64, 64, 40), torch.bfloat16, ("forward",), 108) is None
    (case,) = BENCHMARK.select_cases(["8x64x64x160"])
    assert [each.by for each in BENCHMARK.tilings(case, torch.float32, "forward", KNOWN["h200"])] == ["triton"]


def predicted(*arguments):
    result = CliRunner().invoke(app, ["attention", "--dtype", "bfloat16", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_predictions_show_the_tiles_of_every_site_beside_its_limit():
    text = predicted("--device-spec", "h200", "--mode", "forward,backward")
    _, counted = text.split("COUNTED, not measured: tiles on 132 multiprocessors")
    lines = [line.split() for line in counted.splitlines() if line.strip().startswith("attention")]
    assert {tuple(line[1:5]) for line in lines if line[4] == "triton"} == {
        (mode, "bfloat16", case.name, "triton") for mode in ("forward", "backward") for case in BENCHMARK.cases
    }
    (line,) = [line for line in lines if line[1:5] == ["forward", "bfloat16", "8x1024x77x80", "FlashAttention-2"]]
    # 4 * 8 * 1024 * 77 * 80 of 4 * 8 * 1024 * 128 * 96 operations, 64 blocks, least bytes, bytes over 4300 GB/s.
    assert line[5:] == ["128x64", "201.9", "402.7", "50", "%", "64", "0.48", "2.82", "0.66"]


def test_a_device_without_multiprocessors_gets_no_tiles(tmp_path):
    (tmp_path / "mine.json").write_text('{"copy_gb_s": 100, "matmul_tflop_s": {"bfloat16": 10}}')
    assert "COUNTED" not in predicted("--device-spec", str(tmp_path / "mine.json"))
