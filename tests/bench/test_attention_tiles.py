"""The count of padding, blocks and waves of attention."""

import pytest
import torch
from fastdistill.bench.attention import BENCHMARK
from fastdistill.bench.attention_tiles import library_tiling, main, own_tiling, useful_flops
from fastdistill.kernels.attention.forward import plan_forward
from typer import Typer
from typer.testing import CliRunner


def run(*arguments):
    app = Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("shape", "tile", "useful", "blocks"),
    [
        ((8, 4096, 4096, 40), (128, 64), 62.5, 256),  # 40 of 64 columns
        ((8, 256, 256, 160), (128, 64), 100 * 160 / 192, 16),
        ((10, 1024, 77, 64), (128, 128), 100 * 77 / 128, 80),
        ((8, 64, 77, 160), (128, 64), 100 * 64 / 128 * 77 / 128 * 160 / 192, 8),
    ],
    ids=str,
)
def test_libraries_pad_queries_keys_and_head_dim(shape, tile, useful, blocks):
    found = library_tiling(shape, tile)
    assert found.useful(useful_flops(shape)) == pytest.approx(useful)
    assert found.blocks == blocks
    assert found.waves(132) == pytest.approx(blocks / 132)


def test_no_library_has_a_kernel_for_head_dim_512():
    assert library_tiling((1, 4096, 4096, 512), (128, 64)) is None


@pytest.mark.parametrize("case", BENCHMARK.cases, ids=lambda case: case.name)
def test_our_blocks_cover_every_query_and_do_no_less_than_the_useful_work(case):
    heads, queries, keys, width = case.shape
    q, k = (torch.empty(1, heads, n, width, dtype=torch.bfloat16, device="meta") for n in (queries, keys))
    launches, _ = plan_forward(q, k, k, 1.0)
    found = own_tiling(case.shape, 132)
    assert found.blocks == launches[0].programs
    block, step = map(int, found.name.split(",")[0].split("x"))
    assert found.blocks * block >= heads * queries
    assert step >= keys or step < 256
    assert 0 < found.useful(useful_flops(case.shape)) <= 100


def test_our_tiles_are_planned_for_one_gpu_where_there_is_none():
    assert own_tiling((8, 64, 64, 40), 108) is None


def test_head_dims_of_40_80_and_160_lose_little_to_padding():
    for width, padded in ((40, 48), (80, 80), (160, 160)):
        shape = (8, 1024, 1024, width)
        assert own_tiling(shape, 132).useful(useful_flops(shape)) == pytest.approx(100 * width / padded)


def test_the_table_has_a_line_per_site():
    result = run()
    assert result.exit_code == 0
    assert result.stdout.startswith("COUNTED, not measured: NVIDIA H200, 132 multiprocessors, 16 bit")
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.split()}
    assert {case.name for case in BENCHMARK.cases} <= set(lines)
    assert "62 % 256 1.94" in lines["8x4096x4096x40"]


def test_a_device_without_multiprocessors_is_refused(tmp_path):
    (tmp_path / "mine.json").write_text('{"copy_gb_s": 100, "matmul_tflop_s": {"bfloat16": 10}}')
    result = run("--device-spec", str(tmp_path / "mine.json"))
    assert result.exit_code == 2
    assert "needs multiprocessors" in result.output
